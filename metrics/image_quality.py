"""Pictures."""
import numpy as np
import torch
import torch.nn.functional as F


def gaussian(x, size=11, sigma=1.5):
    """Gaussian filter without padding: (B, C, H, W) -> (B, C, H - size + 1, W - size + 1)."""
    C, t = x.shape[1], torch.arange(size, device=x.device) - size // 2
    k = torch.exp(-t.square() / (2 * sigma ** 2))
    k = (k / k.sum()).expand(C, 1, 1, size)
    return F.conv2d(F.conv2d(x, k, groups=C), k.transpose(2, 3), groups=C)


def ssim(x, y, K1=0.01, K2=0.03):
    """Structural similarity (Wang et al. 2004) of frames (B, C, H, W) in [0, 1] -> (B,)."""
    mx, my, xx, yy, xy = map(gaussian, (x, y, x * x, y * y, x * y))
    top = (2 * mx * my + K1 ** 2) * (2 * (xy - mx * my) + K2 ** 2)
    bottom = (mx * mx + my * my + K1 ** 2) * (xx - mx * mx + yy - my * my + K2 ** 2)
    return (top / bottom).mean((1, 2, 3))


def rate_distortion_bound(covariance, bits):
    """Least mean squared error, per number, of a Gaussian vector of covariance (n, n) at `bits` a vector.

    Reverse water-filling (Cover and Thomas, 10.3): components above the level theta keep an error of theta
    and share the bits, sum of max(0, log2(lambda / theta) / 2) = bits; the others are not coded at all.
    """
    lam = np.linalg.eigvalsh(covariance)[::-1].clip(1e-12)      # largest first
    # theta if just the k largest were coded; the right k is the one that needs the highest level
    theta = 2 ** ((np.cumsum(np.log2(lam)) - 2 * bits) / np.arange(1, len(lam) + 1))
    return np.minimum(theta.max(), lam).mean()


def edge_energy(x):
    """Sum of the squared differences of neighbouring pixels of frames (B, C, H, W)."""
    return x.diff(dim=-1).square().sum() + x.diff(dim=-2).square().sum()
