"""Self-supervised segmentation of wire-bonded semiconductors in automated optical inspection.

The package itself offers a few verbs and the three things that they make. Each is imported from its module on first use, so that
`import aoi_ssl` costs next to nothing."""

__version__ = "0.1.0"

import importlib as _importlib
import sys as _sys
import types as _types

_PUBLIC = {  # name: the module that defines it
    "render_folder": "synthetic",
    "check_folder": "data",
    "load_folder": "data",
    "few_shot": "data",
    "pretrain": "pretrain",
    "pretrain_hiera": "hiera",
    "pretrain_contrastive": "contrastive",
    "distill": "distill",
    "build_bank": "retrieval",
    "empty_bank": "retrieval",
    "calibrate_novelty": "novelty",
    "suggest_next": "suggest",
    "finetune": "segment",
    "segment": "predict",
    "evaluate": "predict",
    "load_segmenter": "predict",
    "scores": "metrics",
    "explore": "explore",
    "inspect": "inspect",
    "teach": "teach",
    "watch": "watch",
    "demo": "demo",
    "Encoder": "encoder",
    "MemoryBank": "retrieval",
    "UperNet": "segment",
}
__all__ = [*_PUBLIC]


class _Package(_types.ModuleType):
    "Looks public names up on first use, and keeps a module from hiding the verb of the same name."

    def __getattr__(self, name):
        if name not in _PUBLIC:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it offers {', '.join(_PUBLIC)}")
        value = getattr(_importlib.import_module(f"{self.__name__}.{_PUBLIC[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name, value):
        # `import aoi_ssl.pretrain` sets the attribute `pretrain` of the package to the module: the verb stays in its place.
        if not (name in _PUBLIC and isinstance(value, _types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self):
        return sorted({*super().__dir__(), *_PUBLIC})


_sys.modules[__name__].__class__ = _Package
