"""Eight shapes of architecture as somebody else would write them: outside of the project, a page each, no edit to it.

Toys: plain, readable, not named after anybody's architecture. Each shows what the contract (`adapters/base.py`) offers
beyond a stack of attention blocks:

    state_space        a recurrence in place of attention: no window, states for a cache, documents that reset them
    experts            one of four experts per token: a further loss, counts of a step over all processes, a buffer
    three_tokens       two further heads for two further tokens
    recurrent_depth    blocks run as often as a step draws; realised operations; a free field at evaluation
    byte_hierarchy     patches of bytes in a wide network, bytes in a narrow one
    sphere             weights that stay on a set
    frozen_base        weights that come from elsewhere
    mixture_of_depths  half of the tokens pass a block

`../<shape>.yaml` trains each: `cd tests/toys && python ../../mytrainer.py --hydra_model_cfg=experts.yaml`.
"""
