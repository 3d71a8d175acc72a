"""How each parameter is stepped: rates and decay relative to the recipe's, which are those of matrices (decay) and of
embedding and head (rate)."""

from __future__ import annotations

from models.current_best.config import CurrentBestConfig
from models.layers.roles import Rule

__all__ = ["rules"]

# Adam's in record26, of everything
OLD_BETAS = 0.8, 0.95
# Rates of record26 in units of its head's, the recipe's
OLD_HEAD, OLD_TABLES, OLD_SCALARS = 0.22, 0.6, 0.04


def rules(cfg: CurrentBestConfig) -> list[Rule]:
    old = cfg.record == "record26"
    every = cfg.of("adam_every")
    high = max(1.0, cfg.hidden_width / cfg.d_model) ** 0.5
    gates, mixes = r"(early|late)_gates\.mudd", r"(exit|layers\.\d+\.mix\.mudd)"

    def adam(
        pattern: str,
        role: str,
        betas: tuple[float, float],
        lr: float,
        wd: float = 0.0,
        width_power: float | None = None,
    ) -> Rule:
        """`lr` and `wd`: of record89, in units of the recipe's. Decay goes as the square of the rate."""
        if old:
            lr, wd, betas = _of_record26(role), 0.0, OLD_BETAS
        return Rule(
            pattern, role, lr_mult=lr, wd_mult=lr * wd, every=every, width_power=width_power, betas=betas
        )

    q_and_k = [2 * cfg.head_width] * (cfg.n_heads // 2) + [cfg.head_width] * (cfg.n_heads % 2)
    split = (cfg.d_model,) * 3 if old else (*q_and_k, *q_and_k, cfg.d_model)
    return [
        Rule(r"layers\.\d+\.self_attn\.qkv_proj\.weight", "matrix", split=split),
        Rule(r"layers\.\d+\.self_attn\.o_proj\.weight", "matrix"),
        # In record89 what Muon makes of a matrix higher than wide, sqrt(m / n) of the rate, is made of its decay too.
        Rule(r"layers\.\d+\.mlp\.up_proj\.weight", "matrix", wd_mult=1.0 if old else high),
        # And this one is stepped as if it lay the other way round, at twice the rate.
        Rule(r"layers\.\d+\.mlp\.down_proj\.weight", "matrix", lr_mult=1.0 if old else 2 * high),
        adam(r"embed_tokens\.weight", "embedding", (0.5, 0.95), 1.0, 150.0),
        adam(r"lm_head\.weight", "head", (0.5, 0.95), 1.0, 150.0),
        adam(r"bigrams\.table\.weight|value_tables\.\d+\.weight", "embedding", (0.75, 0.95), 75.0, 5.0),
        adam(r"smear\.(gate\.weight|strength)", "scalar", (0.9, 0.99), 0.01),
        adam(r".*\.value_gate\.weight", "router", (0.9, 0.99), 1.0, 1.0, width_power=0.0),
        adam(rf"{gates}\.up\.weight", "router", (0.9, 0.99), 0.1, 1.0),
        adam(rf"{gates}\.down\.weight", "router", (0.9, 0.99), 0.1, 1.0, width_power=0.0),
        adam(rf"{gates}\.down\.bias|(early|late)_gates\.fixed|gate_scale", "scalar", (0.9, 0.99), 0.1),
        adam(rf"{mixes}\.up\.weight", "router", (0.9, 0.99), 0.25, 1.0),
        adam(rf"{mixes}\.down\.weight", "router", (0.9, 0.99), 0.25, 1.0, width_power=0.0),
        adam(rf"{mixes}\.down\.bias", "scalar", (0.9, 0.99), 0.25),
        adam(r"layers\.\d+\.pi", "scalar", (0.9, 0.95), 1.0),
        adam(r"layers\.\d+\.rho", "scalar", (0.9, 0.95), 5.0),
        adam(
            r"layers\.\d+\.(self_attn\.(lambdas|value_lambda)|skip_lambda|unet_lambda|x0_lambdas)",
            "scalar",
            (0.9, 0.99),
            5.0,
        ),
    ]


def _of_record26(role: str) -> float:
    """Rate of what is not a matrix, in units of the head's."""
    rate = {"head": OLD_HEAD, "embedding": OLD_TABLES}.get(role, OLD_SCALARS)
    return rate / OLD_HEAD
