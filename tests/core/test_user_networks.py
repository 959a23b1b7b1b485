"""Networks as users write them are explained as plain PyTorch explains them, or refused."""

import pytest

from benchmarks.coverage.users import NETWORKS, checked

# What is not right yet: networks by name, and the reason.
KNOWN = {
    **dict.fromkeys(
        [
            "vit",
            "vit_with_registers",
            "vit_mean",
            "vit_class_and_mean",
            "vit_distilled",
            "vit_wide",
            "vit_multihead_attention",
            "torch_encoder",
            "torch_encoder_norms_behind",
            "torch_encoder_tokens_first",
            "patches_by_view",
            "swin_like",
            "mixer",
            "convolutions_then_attention",
            "sequence_pooling",
            "class_attention",
        ],
        "tokens have no layout",
    ),
    **dict.fromkeys(
        [
            "spatial_transformer",
            "branch_on_shape",
            "assert_on_shape",
            "branch_on_values",
            "number_of_a_tensor",
            "index_writes",
            "index_writes_into_features",
            "star_args",
            "loop_over_batch",
            "checkpointed",
            "attention_head",
            "ordered_dict_output",
            "namedtuple_output",
            "auxiliary_head",
        ],
        "torch.fx can't trace its forward",
    ),
    **dict.fromkeys(
        [
            "tuple_output",
            "list_of_tasks",
            "dict_output",
            "dataclass_output",
            "model_output",
            "logits_with_sides",
            "flat_logit",
        ],
        "its output is no tensor of shape (N, C)",
    ),
    **dict.fromkeys(
        [
            "single_logit",
            "single_probability",
            "multi_label",
            "ends_in_softmax",
            "ends_in_softmax_function",
            "ends_in_sigmoid",
            "regression",
        ],
        "softmax is taken of every output",
    ),
    **dict.fromkeys(["skip_to_head", "two_paths", "ensemble"], "the head takes A alone"),
    **dict.fromkeys(
        ["grey", "four_channels", "thirteen_channels"], "three channels are taken for granted"
    ),
    "configured_size": "224 pixels are taken for granted",
    "volumes": "A needs two dimensions",
    "autocast": "gradients change what autocast keeps",
    "functional_convolutions": "it has no nn.Conv2d",
    "lazy": "its weights have no shapes yet, a traceback says",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(reason=KNOWN[name])) if name in KNOWN else name
        for name in NETWORKS
    ],
)
def test_a_users_network_is_right(name):
    outcome = checked(NETWORKS[name])
    assert outcome.result == "right", outcome.why


def test_known_failures_are_networks():
    assert set(KNOWN) <= set(NETWORKS)
