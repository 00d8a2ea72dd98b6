"""Algorithm 1, exactly as published: is the distribution one Gaussian or two?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from gradshield.thresholds.base import THRESHOLDS, require_rows
from gradshield.types import Anchors, Cut, Floats

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture  # takes longer to import than all the rest of this room

MANY = 50_000  # above this, the five starts are tried on a sample of this size


@THRESHOLDS.register("adaptive")
class Adaptive:
    """Algorithm 1: one Gaussian or a mixture of two, by log-likelihood; can lose most of a harmless bimodal set.

    Paper: arXiv 2605.14194, Algorithm 1.
    Equation: LogL2 - LogL1 > α: t = min(max of component 0, max of component 1); else t = μ + 2σ.
    Departures: none in the rule. Scores are standardised before the fit, because scikit-learn's ``reg_covar`` has a
    scale; a likelihood difference does not change under it. α = 10 is our choice: the paper's value was not available.
    Above 50,000 rows a random 50,000 choose among the starts, and expectation-maximisation continues from there on all rows.
    """

    name = "adaptive"

    def __init__(self, alpha: float = 10.0, seed: int = 0) -> None:
        self.alpha, self.seed = alpha, seed

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores: μ + 2σ for fewer than three rows; equal scores are all kept."""
        require_rows(values)
        mu, sigma = float(np.mean(values)), float(np.std(values))
        detail: dict[str, object] = {"mu": mu, "sigma": sigma, "alpha": self.alpha, "branch": "one Gaussian"}
        if np.ptp(values) == 0:  # rounding may put their mean below them, which would remove all
            return Cut(float(values[0]), self.name, detail)
        if len(values) < 3 or sigma == 0:
            return Cut(mu + 2 * sigma, self.name, detail)
        z = ((values - mu) / sigma)[:, None]
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct scores than components
            one = GaussianMixture(1, random_state=self.seed).fit(z)
            two = self._two(z)
        likelihood = [float(fit.score(z)) * len(z) for fit in (one, two)]  # .score is a mean
        detail |= {
            "log_likelihood_1": likelihood[0],
            "log_likelihood_2": likelihood[1],
            "components": [
                {"weight": float(w), "mean": float(mu + sigma * m), "std": float(sigma * np.sqrt(c))}
                for w, m, c in zip(two.weights_, two.means_[:, 0], two.covariances_[:, 0, 0], strict=True)
            ],
        }
        labels = two.predict(z)
        if likelihood[1] - likelihood[0] > self.alpha and len(set(labels.tolist())) == 2:
            detail["branch"] = "two Gaussians"
            return Cut(float(min(values[labels == 0].max(), values[labels == 1].max())), self.name, detail)
        return Cut(mu + 2 * sigma, self.name, detail)

    def _two(self, z: Floats) -> GaussianMixture:
        """The mixture of two, fitted to (N, 1) standardised scores."""
        from sklearn.mixture import GaussianMixture

        if len(z) <= MANY:
            return GaussianMixture(2, n_init=5, random_state=self.seed).fit(z)
        some = z[np.random.default_rng(self.seed).choice(len(z), MANY, replace=False)]
        start = GaussianMixture(2, n_init=5, random_state=self.seed).fit(some)
        return GaussianMixture(
            2,
            weights_init=start.weights_,
            means_init=start.means_,
            precisions_init=start.precisions_,
            random_state=self.seed,
        ).fit(z)
