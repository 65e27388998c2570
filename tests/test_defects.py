"Defects that are painted are where they say, and nowhere else."

import pytest
import torch
from scipy import ndimage

from aoi_ssl.core import AoiError
from aoi_ssl.defects import paste_defect


def test_defects_are_where_they_say():
    image, mask = torch.full((2, 96, 96), 0.5), torch.zeros(2, 96, 96, dtype=torch.bool)
    mask[0, 40:44, 10:80] = True
    image[:, 40:44, 10:80] = 0.9
    for kind in ("scratch", "blob", "missing"):
        made, where = paste_defect(image, kind, mask=mask, seed=3)
        again, _ = paste_defect(image, kind, mask=mask, seed=3)
        near = torch.from_numpy(ndimage.binary_dilation(where.numpy(), iterations=3))
        assert torch.equal(made, again) and where.any() and torch.equal(made[:, ~near], image[:, ~near])
        assert (made - image).abs()[:, where].mean() > 0.05 and 0 <= made.min() and made.max() <= 1
    assert made[:, mask[0]].max() < 0.7, "the wire is still there"
    with pytest.raises(AoiError, match="no wire"):
        paste_defect(image, "missing", mask=torch.zeros_like(mask))
    with pytest.raises(AoiError, match="mask="):
        paste_defect(image, "missing")
