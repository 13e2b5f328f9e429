"""Policy losses with weights for VeRL-Omni (github.com/verl-project/verl-omni).

``register`` replaces VeRL-Omni's losses by subclasses of them, and patches its FSDP engines to pass latents and maps to
the losses. Without weights a loss is that of the class that it replaces, bit for bit. VeRL-Omni is not imported before
``register`` is called. docs/verl-omni.md shows how to use it in a run, and names the version whose interface this is.
"""

from star_kernels.integrations.means import mean_transition, policy_loss_of_means, ratio_of_means
from star_kernels.integrations.verl_omni.engine import feed_latents, prompts_of, with_latents
from star_kernels.integrations.verl_omni.losses import Clipped, ForwardProcess, Guarded, Options, StarLoss
from star_kernels.integrations.verl_omni.registration import ALGORITHMS, ENGINES, register

__all__ = [
    "ALGORITHMS",
    "ENGINES",
    "Clipped",
    "ForwardProcess",
    "Guarded",
    "Options",
    "StarLoss",
    "feed_latents",
    "mean_transition",
    "policy_loss_of_means",
    "prompts_of",
    "ratio_of_means",
    "register",
    "with_latents",
]
