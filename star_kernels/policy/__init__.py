"""The policy losses with a weight for each latent position, and the sampling step that feeds them."""

from star_kernels.policy.loss import PolicyLoss, weighted_nft_loss, weighted_policy_loss
from star_kernels.policy.sampling import sample_transition
from star_kernels.policy.transitions import Transition, dance_sde, flow_cps, flow_matching, flow_sde

__all__ = [
    "PolicyLoss",
    "Transition",
    "dance_sde",
    "flow_cps",
    "flow_matching",
    "flow_sde",
    "sample_transition",
    "weighted_nft_loss",
    "weighted_policy_loss",
]
