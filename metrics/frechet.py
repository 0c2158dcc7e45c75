"""FID, KID, FVD and LPIPS by NVIDIA's TorchScript detectors, given by path; without the file, not computed.

    --inception=inception-2015-12-05.pt   frames (N, 3, H, W) in 0..255 -> (N, 2048)          FID, KID
    --i3d=i3d_torchscript.pt              videos (N, 3, T, H, W) in 0..255 -> (N, 400)        FVD
    --vgg=vgg16.pt                        frames (N, 3, H, W) in 0..255 -> (N, K), whose squared distances are
                                          LPIPS

Grey is repeated to three channels. Means and covariances are summed up in float64 as the features come.
"""
import math

import torch

from common.flags import UserError

KINDS = {"inception": dict(return_features=True),
         "i3d": dict(rescale=True, resize=True, return_features=True),
         "vgg": dict(resize_images=False, return_lpips=True)}
LEAST_FRAMES = 10       # of a video, for I3D
KEPT = 10_000           # features that KID is computed from, at most


class Detector:
    """A network of KINDS: frames or videos (N, C, ..., H, W) in [0, 1] -> features (N, K), float64."""

    def __init__(self, path, kind, device):
        self.kind, self.device = kind, device
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise UserError(f"--{kind}={path}: not read as TorchScript: {reason}") from None

    @torch.no_grad()
    def __call__(self, x):
        if self.kind == "i3d" and x.shape[2] < LEAST_FRAMES:
            raise UserError(f"--i3d: it needs videos of {LEAST_FRAMES} frames or more, not {x.shape[2]}")
        x = x.expand(-1, 3, *x.shape[2:]) * 255
        try:
            parts = [self.net(part.to(self.device), **KINDS[self.kind]).double().cpu()
                     for part in x.split(4 if self.kind == "i3d" else 64)]
        except RuntimeError as error:
            raise UserError(f"--{self.kind}: not such a detector: {str(error).splitlines()[-1]}") from None
        return torch.cat(parts)


class Features:
    """Mean (K,) and covariance (K, K) of features that come in batches (N, K); the first of them are kept."""

    def __init__(self):
        self.many, self.sum, self.outer, self.kept = 0, 0, 0, []

    def add(self, x):
        self.kept += [x] if self.many < KEPT else []
        self.many, self.sum, self.outer = self.many + len(x), self.sum + x.sum(0), self.outer + x.T @ x

    def mean(self):
        return self.sum / self.many

    def covariance(self):
        """Divided by N, as StyleGAN's."""
        return self.outer / self.many - torch.outer(self.mean(), self.mean())


def frechet(a, b):
    """Fréchet distance of two Gaussians (Heusel et al. 2017) from their Features; nan without any.

    |m - n|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). That trace is the sum of the roots of the eigenvalues of
    A^(1/2) B A^(1/2), a symmetric matrix: it is right where A or B is singular, as they are for N below K.
    """
    if not a.many:
        return math.nan
    A, B = a.covariance(), b.covariance()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return ((a.mean() - b.mean()).square().sum() + A.trace() + B.trace() - 2 * cross).clamp(min=0).item()


def kernel_distance(a, b):
    """KID (Binkowski et al. 2018), unbiased for small N: squared MMD under (x . y / K + 1)^3; or nan."""
    if not a.many:
        return math.nan
    x, y = torch.cat(a.kept), torch.cat(b.kept)
    k = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3                                        # noqa: E731
    inside = lambda x: (k(x, x).sum() - k(x, x).trace()) / (len(x) * (len(x) - 1))          # noqa: E731
    return (inside(x) + inside(y) - 2 * k(x, y).mean()).item()
