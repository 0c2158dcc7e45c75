"""FID, KID, FVD and LPIPS, by NVIDIA's TorchScript detectors; for evaluate.py generation.

    --inception=inception-2015-12-05.pt   frames (N, 3, H, W) in 0..255 -> (N, 2048)    FID, KID
    --i3d=i3d_torchscript.pt              videos (N, 3, T, H, W) in 0..255 -> (N, 400)  FVD
    --vgg=vgg16.pt                        frames (N, 3, H, W) in 0..255 -> (N, K)       LPIPS

LPIPS is the squared distance of two frames' features. Grey is repeated to three channels. A metric
whose file is not given is not computed: another network under the same name would not be
comparable.
"""
import math

import torch

from common.flags import UserError

# The arguments that each detector takes, as NVIDIA's own scripts call it.
KINDS = {
    "inception": dict(return_features=True),
    "i3d": dict(rescale=True, resize=True, return_features=True),
    "vgg": dict(resize_images=False, return_lpips=True),
}
MIN_FRAMES = 10         # of a video, for I3D
MAX_KEPT = 10_000       # features that KID is computed from


class Detector:
    """One network of KINDS: frames or videos (N, C, ..., H, W) in [0, 1] -> float64 (N, K)."""

    def __init__(self, path, kind, device):
        self.kind = kind
        self.device = device
        self.batch = 4 if kind == "i3d" else 64
        try:
            self.net = torch.jit.load(path, map_location=device).eval()
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0].partition(". ")[0]
            raise UserError(f"--{kind}={path}: not read as TorchScript: {reason}") from None

    @torch.no_grad()
    def __call__(self, x):
        """Features of x; UserError where a video is too short or the file is another network."""
        if self.kind == "i3d" and x.shape[2] < MIN_FRAMES:
            raise UserError(f"--i3d: it needs videos of {MIN_FRAMES} frames or more, "
                            f"not {x.shape[2]}")
        x = x.expand(-1, 3, *x.shape[2:]) * 255
        features = []
        try:
            for part in x.split(self.batch):
                found = self.net(part.to(self.device), **KINDS[self.kind])          # n K
                features.append(found.double().cpu())
        except RuntimeError as error:
            reason = str(error).splitlines()[-1]
            raise UserError(f"--{self.kind}: not such a detector: {reason}") from None
        return torch.cat(features)


class Features:
    """Mean (K,) and covariance (K, K) of features that come in batches; MAX_KEPT are kept."""

    def __init__(self):
        self.many = 0
        self.sum = 0
        self.outer = 0
        self.kept = []

    def add(self, x):
        """Add features (N, K), float64."""
        if self.many < MAX_KEPT:
            self.kept.append(x)
        self.many = self.many + len(x)
        self.sum = self.sum + x.sum(0)
        self.outer = self.outer + x.T @ x

    def mean(self):
        """Mean of all features, (K,)."""
        return self.sum / self.many

    def covariance(self):
        """Covariance (K, K), divided by N as StyleGAN does."""
        return self.outer / self.many - torch.outer(self.mean(), self.mean())


def frechet(a, b):
    """Fréchet distance (Heusel et al. 2017) of the Gaussians of two Features; nan without any.

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)), with the covariances A and B.
    """
    if not a.many:
        return math.nan
    A = a.covariance()
    B = b.covariance()
    # The last trace is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2). That matrix is
    # symmetric, so this is right also where A or B is singular, as they are for N < K.
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                         # K K
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean() - b.mean()).square().sum() + A.trace() + B.trace() - 2 * cross
    return distance.clamp(min=0).item()


def cubic_kernel(x, y):
    """(x . y / K + 1)^3 of features (N, K) and (M, K) -> (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_pairs(x):
    """Mean kernel of two different features of x (N, K)."""
    kernel = cubic_kernel(x, x)
    return (kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1))


def kernel_distance(a, b):
    """KID (Binkowski et al. 2018) of two Features, a squared MMD, unbiased for small N; or nan."""
    if not a.many:
        return math.nan
    x = torch.cat(a.kept)
    y = torch.cat(b.kept)
    return (mean_of_pairs(x) + mean_of_pairs(y) - 2 * cubic_kernel(x, y).mean()).item()
