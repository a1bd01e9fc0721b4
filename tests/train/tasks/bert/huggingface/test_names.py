"""The names of other programs for our parameters."""

import re

import numpy as np
import pytest
from safetensors import safe_open

from optim_zoo import tree
from optim_zoo.train.tasks.bert.huggingface import names
from tests.train.tasks.bert.huggingface.small import LOWER, RECORDED, model, params

# google-research/bert: the variables of BERT-base's checkpoint, with one layer.
TENSORFLOW = """
bert/embeddings/word_embeddings bert/embeddings/position_embeddings
bert/embeddings/token_type_embeddings bert/embeddings/LayerNorm/beta bert/embeddings/LayerNorm/gamma
bert/encoder/layer_0/attention/self/query/kernel bert/encoder/layer_0/attention/self/query/bias
bert/encoder/layer_0/attention/self/key/kernel bert/encoder/layer_0/attention/self/key/bias
bert/encoder/layer_0/attention/self/value/kernel bert/encoder/layer_0/attention/self/value/bias
bert/encoder/layer_0/attention/output/dense/kernel bert/encoder/layer_0/attention/output/dense/bias
bert/encoder/layer_0/attention/output/LayerNorm/beta
bert/encoder/layer_0/attention/output/LayerNorm/gamma
bert/encoder/layer_0/intermediate/dense/kernel bert/encoder/layer_0/intermediate/dense/bias
bert/encoder/layer_0/output/dense/kernel bert/encoder/layer_0/output/dense/bias
bert/encoder/layer_0/output/LayerNorm/beta bert/encoder/layer_0/output/LayerNorm/gamma
cls/predictions/transform/dense/kernel cls/predictions/transform/dense/bias
cls/predictions/transform/LayerNorm/beta cls/predictions/transform/LayerNorm/gamma
cls/predictions/output_bias
"""


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_names_are_those_that_transformers_writes(scan_layers: bool) -> None:
    with safe_open(RECORDED / "model.safetensors", "numpy") as file:
        written = set(file.keys())
    arrays = names.unstacked(params(model(num_layers=2, scan_layers=scan_layers), LOWER))
    assert {names.hugging_face(path) for path in arrays} == written


def test_the_names_are_those_of_a_tensorflow_checkpoint() -> None:
    arrays = names.unstacked(params(model(num_layers=1), LOWER))
    assert {names.tensorflow(path) for path in arrays} == set(TENSORFLOW.split())


@pytest.mark.parametrize("name_of", [names.hugging_face, names.tensorflow])
@pytest.mark.parametrize("path", ["tail/kernel", "output/kernel", "tagger/mu", "embeddings"])
def test_other_parameters_have_no_name(name_of: object, path: str) -> None:
    assert callable(name_of)
    assert name_of(path) is None


def test_layers_above_the_ninth_have_their_number() -> None:
    path = "encoder/layer_11/attention_LayerNorm/scale"
    assert names.hugging_face(path) == "bert.encoder.layer.11.attention.output.LayerNorm.weight"
    assert names.tensorflow(path) == "bert/encoder/layer_11/attention/output/LayerNorm/gamma"


def test_stacked_and_separate_layers_are_the_same_arrays() -> None:
    stacked = params(model(), LOWER)
    arrays = names.unstacked(stacked)
    assert not any(re.search("^encoder/layers/", path) for path in arrays)
    separate = names.stacked(
        lambda path, _: arrays[path], params(model(scan_layers=False), LOWER, seed=1)
    )
    again = names.stacked(lambda path, _: names.unstacked(separate)[path], stacked)
    for path, array in tree.by_path(stacked).items():
        np.testing.assert_array_equal(tree.by_path(again)[path], array)
    np.testing.assert_array_equal(
        separate["encoder"]["layer_2"]["output"]["bias"],
        stacked["encoder"]["layers"]["output"]["bias"][2],
    )
