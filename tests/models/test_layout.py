"""Where the parts of a folder are: a Router's routes as folders of their own, and Routers that are refused."""

import json

import pytest

from embedjax.config.errors import ConfigError
from embedjax.models.folders import read_tower, resolve
from embedjax.models.layout import layout, routes

NAMES = {"T": "Transformer", "P": "Pooling", "N": "Normalize", "S": "StaticEmbedding", "D": "Dense"}


def write(folder, structure, after=(), **parameters):
    """A Router's JSON files: routes as lists of module folders whose last letter tells the kind."""
    folder.mkdir(exist_ok=True)
    kind = lambda name: f"sentence_transformers.models.{NAMES[name[-1]]}"
    entries = [{"path": "", "type": "sentence_transformers.base.modules.router.Router"}]
    entries += [{"path": name, "type": kind(name)} for name in after]
    (folder / "modules.json").write_text(json.dumps(entries))
    types = {name: kind(name) for names in structure.values() for name in names}
    config = {"types": types, "structure": structure, "parameters": parameters}
    (folder / "router_config.json").write_text(json.dumps(config))
    return folder


def test_each_route_has_its_modules_and_those_that_follow(tmp_path):
    folder = write(tmp_path / "m", {"query": ["q/S"], "document": ["0_T", "1_P", "2_D"]}, after=["1_N"])
    assert routes(folder) == {"query": folder / "query", "document": folder / "document"}
    assert resolve(folder / "query") == folder / "query", "a route needs no folder of its name"
    query, document = layout(folder / "query"), layout(folder / "document")
    assert (query.encoder, query.pooling, query.static, query.normalize) == (folder / "q/S", None, True, True)
    assert (document.encoder, document.pooling, document.dense) == (folder / "0_T", folder / "1_P", (folder / "2_D",))
    assert query.settings == document.settings == folder and document.normalize and not document.static
    with pytest.raises(ConfigError, match="name one: .*query"):
        read_tower(folder)


def test_folders_of_one_model_have_no_routes(tmp_path):
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "config.json").write_text("{}")
    assert routes(tmp_path) == {} and layout(tmp_path / "query").encoder == tmp_path / "query"
    (tmp_path / "document").mkdir()
    (tmp_path / "document" / "config.json").write_text("{}")
    assert routes(tmp_path) == {"query": tmp_path / "query", "document": tmp_path / "document"}
    (tmp_path / "config.json").write_text("{}")
    assert routes(tmp_path) == {}


@pytest.mark.parametrize(
    ("structure", "parameters", "told"),
    [
        ({"text": ["T", "P"], "query": ["T", "P"]}, {}, "expected ['document', 'query'] or ['image', 'text']"),
        ({"query": ["S"], "document": ["S"]}, {"route_mappings": {"('query', None)": "query"}}, "route_mappings"),
        ({"query": ["../S"], "document": ["S"]}, {}, "leaves the folder"),
        ({"query": ["P", "T"], "document": ["S"]}, {}, "lists the modules Pooling Transformer"),
        ({"query": "S", "document": ["S"]}, {}, "expected names among"),
    ],
)
def test_other_routers_are_refused(tmp_path, structure, parameters, told):
    folder = write(tmp_path / "m", structure, **parameters)
    with pytest.raises(ConfigError) as caught:
        layout(routes(folder)["query"])
    assert told in str(caught.value) and "router_config.json" in str(caught.value)


def test_code_of_a_route_is_never_run(tmp_path):
    folder = write(tmp_path / "m", {"query": ["S"], "document": ["S"]})
    config = json.loads((folder / "router_config.json").read_text())
    (folder / "router_config.json").write_text(json.dumps(config | {"types": {"S": "mine.Static"}}))
    with pytest.raises(ConfigError, match="code of a folder is never run"):
        routes(folder)
