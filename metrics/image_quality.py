"""How close frames are to the true ones: SSIM, edges, a rate-distortion bound; for evaluate.py."""
import numpy as np
import torch
import torch.nn.functional as F


def gaussian(x, size=11, sigma=1.5):
    """Gaussian filter without padding: (B, C, H, W) -> (B, C, H - size + 1, W - size + 1)."""
    C = x.shape[1]
    offsets = torch.arange(size, device=x.device) - size // 2
    kernel = torch.exp(-offsets.square() / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(C, 1, 1, size)                  # C 1 1 size
    # The filter of a square is the filter of its rows, then of its columns: 2 * 11 products, not
    # 121.
    rows = F.conv2d(x, kernel, groups=C)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=C)


def ssim(x, y, K1=0.01, K2=0.03):
    """Structural similarity (Wang et al. 2004) of frames (B, C, H, W) in [0, 1] -> (B,)."""
    # Means, squares and product in an 11 x 11 Gaussian window around each pixel.
    mx = gaussian(x)
    my = gaussian(y)
    xx = gaussian(x * x)
    yy = gaussian(y * y)
    xy = gaussian(x * y)
    # Luminance and contrast-structure, Eq. 13 there with a dynamic range of 1.
    top = (2 * mx * my + K1 ** 2) * (2 * (xy - mx * my) + K2 ** 2)
    bottom = (mx * mx + my * my + K1 ** 2) * (xx - mx * mx + yy - my * my + K2 ** 2)
    return (top / bottom).mean((1, 2, 3))


def frame_scores(x, y):
    """MSE, MAE, PSNR and SSIM of frames y (B, C, H, W) in [0, 1] against x: (4, B)."""
    mse = (x - y).square().mean((1, 2, 3))
    mae = (x - y).abs().mean((1, 2, 3))
    psnr = -10 * mse.clamp(min=1e-10).log10()
    return torch.stack([mse, mae, psnr, ssim(x, y)])


def edge_energy(x):
    """Sharpness: sum of the squared differences of neighbouring pixels of frames (B, C, H, W)."""
    return x.diff(dim=-1).square().sum() + x.diff(dim=-2).square().sum()


def rate_distortion_bound(covariance, bits):
    """Least mean squared error, per number, of a Gaussian vector coded with `bits` bits.

    covariance (n, n) of the vector. Reverse water-filling (Cover and Thomas, 10.3): components
    above the level theta keep an error of theta and share the bits, so that the sum of max(0,
    log2(lambda / theta) / 2) is `bits`. The others are not coded at all.
    """
    variances = np.linalg.eigvalsh(covariance)[::-1].clip(1e-12)            # n, the largest first
    # The level if just the k largest were coded, for each k. The right k is the one with the
    # highest level.
    coded = np.arange(1, len(variances) + 1)
    levels = 2 ** ((np.cumsum(np.log2(variances)) - 2 * bits) / coded)
    return np.minimum(levels.max(), variances).mean()
