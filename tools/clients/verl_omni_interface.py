"""What star_kernels.integrations.verl_omni relies on in VeRL-Omni, at the commit that docs/verl-omni.md names."""

from __future__ import annotations

from tools.clients.interface import Interface

COMMIT = "a1139bafffb5b9711f0a6b6edff8ecaa60bfff30"

ALGORITHMS = "verl_omni/trainer/diffusion/diffusion_algos.py"
ENGINES = "verl_omni/workers/engine/fsdp/diffusers_impl.py"
SCHEDULER = "verl_omni/pipelines/schedulers/flow_match_sde.py"
ATTENTION = "verl_omni/utils/diffusion_attention.py"

_CALL = ["self", "*", "config", "model_output", "data"]
_STEP = ["self", "micro_batch", "loss_function", "forward_only", "step"]
_RATIO = ["cls", "*", "old_log_prob", "log_prob", "advantages", "config"]
_MEANS = ["old_prev_sample_mean", "prev_sample_mean", "std_dev_t", "sqrt_dt"]
_OF_MEANS = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
_OLD_MEANS = ("old_log_probs", "advantages", "old_prev_sample_mean")
_NFT = ("forward_prediction", "old_prediction", "ref_forward_prediction", "x0", "xt", "t_expanded")

INTERFACE: Interface = {
    ALGORITHMS: {
        "DIFFUSION_LOSS_REGISTRY": {},
        "register_diffusion_loss": ["name"],
        "get_diffusion_loss_fn": ["name"],
        "DiffusionLossFn.validate_inputs": ["self", "*", "loss_name", "model_output", "data"],
        "DiffusionLossFn.__call__": _CALL,
        "DiffusionLossFn.prepare_actor_batch": ["batch", "reward_tensor", "config"],
        "FlowGRPOLoss.required_model_output_keys": ("log_probs",),
        "FlowGRPOLoss.required_data_keys": ("old_log_probs", "advantages"),
        "FlowGRPOLoss.compute_loss": [*_RATIO, "rollout_is_weights="],
        "FlowGRPOLoss.__call__": _CALL,
        "GRPOGuardLoss.required_model_output_keys": _OF_MEANS,
        "GRPOGuardLoss.required_data_keys": _OLD_MEANS,
        "GRPOGuardLoss.compute_loss": [*_RATIO, *_MEANS, "rollout_is_weights="],
        "GRPOGuardLoss.__call__": _CALL,
        "FlowDPPOLoss.required_model_output_keys": _OF_MEANS,
        "FlowDPPOLoss.required_data_keys": _OLD_MEANS,
        "FlowDPPOLoss.compute_loss": [*_RATIO, *_MEANS, "rollout_is_weights="],
        "FlowDPPOLoss.__call__": _CALL,
        "DiffusionNFTLoss.required_model_output_keys": _NFT,
        "DiffusionNFTLoss.required_data_keys": ("reward_prob",),
        "DiffusionNFTLoss.compute_loss": ["cls", "*", *_NFT, "reward_prob", "config"],
        "DiffusionNFTLoss.__call__": _CALL,
    },
    ENGINES: {
        "PPODiffusersFSDPEngine.forward_step": _STEP,
        "NFTDiffusersFSDPEngine.forward_step": _STEP,
        "DPODiffusersFSDPEngine.forward_step": _STEP,
    },
    "verl_omni/workers/engine/veomni/diffusion_impl.py": {"VeOmniDiffusionEngine.forward_step": _STEP},
    "verl_omni/workers/utils/losses.py": {"diffusion_loss": ["config", "model_output", "data", "dp_group="]},
    SCHEDULER: {
        "FlowMatchSDEDiscreteScheduler.sample_previous_step": [
            *("self", "sample", "model_output", "timestep=", "generator=", "per_token_timesteps=", "noise_level="),
            *("prev_sample=", "sde_type=", "return_logprobs=", "return_sqrt_dt=", "include_logprob_normalizer="),
        ],
    },
    ATTENTION: {"ACTOR_NATIVE_BACKEND": "native", "ROLLOUT_SDPA_BACKEND": "TORCH_SDPA"},
    "verl_omni/workers/config/diffusion/actor.py": {
        "DiffusionLossConfig.loss_mode": "flow_grpo",
        "DiffusionLossConfig.adaptive_weight_min": 1e-5,
        "DiffusionLossConfig.kl_mask_threshold": 1e-5,
        "DiffusionLossConfig.add_kl_coefficient": True,
    },
}

# The metrics of the clipped losses, which dashboards read.
METRICS = tuple(
    f"actor/{name}"
    for name in ("ppo_kl", "pg_clipfrac", "pg_clipfrac_higher", "pg_clipfrac_lower", "ratio_mean", "ratio_std")
)
# Those of Flow-DPPO.
MASK_METRICS = tuple(
    f"actor/{name}"
    for name in (
        *("ppo_kl", "approx_kl", "ratio_mean", "ratio_std", "ratio_min", "ratio_max", "kl_new_old_mean"),
        *("kl_new_old_max", "kl_mask_fraction", "pos_rm_fraction", "neg_rm_fraction", "masked_fraction"),
        "unmasked_fraction",
    )
)
NFT_METRICS = tuple(
    f"actor/{name}"
    for name in (
        *("policy_loss", "positive_loss", "negative_loss", "ref_kl_loss", "old_deviate"),
        *("reward_prob_mean", "total_loss"),
    )
)
