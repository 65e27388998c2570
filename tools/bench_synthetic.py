"Pictures of 512 x 512 that one core renders in a second; at least 2 are promised."
import sys
import time

from aoi_ssl.synthetic import render


def bench(
    devices: int = 10,  # how many layouts
    images: int = 3,  # pictures of each
) -> float:  # pictures (two lights and masks) per second of processor time, the first of each device included
    "Render `devices` x `images` pictures on one core."
    start = time.process_time()
    for device in range(devices):
        for image in range(images):
            render(device, image)
    return devices * images / (time.process_time() - start)


if __name__ == "__main__":
    rate = bench()
    print(f"rendering: {rate:.1f} images of 512x512 (two lights, masks) per second on one core (at least 2 promised)")
    sys.exit(rate < 2)
