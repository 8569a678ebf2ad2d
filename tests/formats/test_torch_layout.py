"""Weights to torch's layout and back: names that torch gives, and not a bit lost."""

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from guided_distill.errors import UserError
from guided_distill.formats.torch_layout import canonical, to_tensors, to_tree, torch_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv_in/kernel", "conv_in.weight"),
        ("time_embedding/linear_1/bias", "time_embedding.linear_1.bias"),
        ("down_blocks_0/resnets_11/norm1/scale", "down_blocks.0.resnets.11.norm1.weight"),
        ("mid_block/attentions_0/proj_in/kernel", "mid_block.attentions.0.proj_in.weight"),
        (
            "up_blocks_1/attentions_2/transformer_blocks_0/attn1/to_out_0/kernel",
            "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0.weight",
        ),
        ("transformer_blocks_3/ff/net_0/proj/kernel", "transformer_blocks.3.ff.net.0.proj.weight"),
        ("transformer_blocks_3/ff/net_2/kernel", "transformer_blocks.3.ff.net.2.weight"),
        ("proj_out_1/kernel", "proj_out_1.weight"),
        ("encoder/layers_3/layer_norm1/scale", "encoder.layers.3.layer_norm1.weight"),
        ("embeddings/token_embedding/embedding", "embeddings.token_embedding.weight"),
        ("quantize/embedding/embedding", "quantize.embedding.weight"),
    ],
)
def test_names_are_torchs(path, name):
    assert torch_name(tuple(path.split("/"))) == name


def test_layouts_are_torchs():
    tree = {
        "conv": {"kernel": np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)},
        "dense": {"kernel": np.arange(6).reshape(2, 3)},
        "embed": {"embedding": np.arange(6).reshape(2, 3)},
        "norm": {"scale": np.arange(3)},
    }
    tensors = to_tensors(tree)
    assert tensors["conv.weight"].shape == (5, 4, 2, 3)
    assert tensors["conv.weight"][4, 3, 1, 2] == tree["conv"]["kernel"][1, 2, 3, 4]
    assert tensors["dense.weight"][2, 1] == tree["dense"]["kernel"][1, 2]
    assert tensors["embed.weight"][1, 2] == tree["embed"]["embedding"][1, 2]
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


@pytest.mark.parametrize(
    "tree", [tiny.unet, tiny.vae, tiny.vq, tiny.text_encoder], ids=lambda tree: tree.__name__
)
def test_there_and_back_is_the_same(tree, assert_same_weights):
    tree = tree()
    tensors = to_tensors(tree)
    assert len(tensors) == len(jax.tree.leaves(tree))
    back = to_tree(tensors, tree, source="a")
    assert_same_weights(tree, back)
    again = to_tensors(back)
    assert {name: tensor.tobytes() for name, tensor in again.items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }


def test_half_precision_is_read_exactly():
    half = {"dense.bias": np.array([0.1, 3.0], np.float16)}
    tree = to_tree(half, {"dense": {"bias": np.zeros(2)}}, source="a")
    assert tree["dense"]["bias"].dtype == np.float32
    np.testing.assert_array_equal(tree["dense"]["bias"], half["dense.bias"].astype(np.float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "complex64"])
def test_quantized_and_complex_weights_are_refused(dtype):
    tensors = {"dense.bias": np.ones(2, dtype)}
    with pytest.raises(UserError, match=rf"^FILE holds dense\.bias as {dtype}, .*quantized$"):
        to_tree(tensors, {"dense": {"bias": np.zeros(2)}}, source="FILE")


def test_old_names_are_read_as_todays(assert_same_weights):
    tree = tiny.vae()
    old = {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in to_tensors(tree).items():
        for new, legacy in names.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, legacy)
                tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        old[name] = tensor
    assert sum("proj_attn" in name for name in old) == 4
    assert_same_weights(tree, to_tree(canonical(old), tree, source="a"))


def test_the_text_encoders_prefix_and_positions_go(assert_same_weights):
    tree = tiny.text_encoder()
    old = {f"text_model.{name}": tensor for name, tensor in to_tensors(tree).items()}
    old["text_model.embeddings.position_ids"] = np.arange(7)[None]
    assert_same_weights(tree, to_tree(canonical(old), tree, source="a"))


def test_every_fault_is_named():
    template = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "b": {"scale": np.ones(4)}}
    tensors = to_tensors(template)
    del tensors["b.weight"]
    tensors["a.weight"] = np.zeros((2, 3))
    tensors["strange"] = np.zeros(1)
    with pytest.raises(UserError) as caught:
        to_tree(tensors, template, source="FILE")
    said = str(caught.value)
    assert said.startswith("FILE lacks b.weight; ")
    assert "strange" in said
    assert "a.weight (2 x 3, not 3 x 2)" in said


def test_ten_tensors_are_listed_at_most():
    template = {f"n{index:02}": {"bias": np.zeros(1)} for index in range(25)}
    with pytest.raises(UserError, match=r"n09\.bias and 15 more"):
        to_tree({}, template, source="FILE")


def test_every_tensor_has_a_name_of_its_own():
    tree = tiny.unet(num_classes=3)
    names = {torch_name(path) for path in flatten_dict(tree)}
    assert len(names) == len(flatten_dict(tree))
    assert "class_embedder.weight" in names
