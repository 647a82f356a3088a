"""The configuration seen from Python: JSON schema, printed YAML and PyYAML agree, and the schema misses no setting."""

import json
import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "build" / "bin" / "config_tool"


def tool(*arguments, check=True):
    done = subprocess.run([TOOL, *map(str, arguments)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def schema():
    return json.loads(tool("schema").stdout)


def fields_of_schema(node, prefix=""):
    for key, child in node["properties"].items():
        name = f"{prefix}.{key}" if prefix else key
        if "properties" in child:
            yield from fields_of_schema(child, name)
        elif name != "base":
            yield name, child


def fields_of_yaml(node, prefix=""):
    for key, child in node.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(child, dict):
            yield from fields_of_yaml(child, name)
        else:
            yield name, child


def print_config(path, *overrides):
    return yaml.safe_load(tool("print", path, *overrides).stdout)


def accepts(schema, value):
    """The part of JSON Schema that the configuration uses."""
    if "anyOf" in schema:
        return any(accepts(each, value) for each in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    kind = schema["type"]
    if kind == "integer":
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif kind == "number":
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif kind == "array":
        return isinstance(value, list) and all(accepts(schema["items"], item) for item in value)
    elif kind == "object":
        return (isinstance(value, dict) and set(schema.get("required", ())) <= set(value)
                and all(key in schema["properties"] and accepts(schema["properties"][key], item)
                        for key, item in value.items()))
    else:
        fits = isinstance(value, {"boolean": bool, "string": str}[kind])
    return (fits
            and ("minimum" not in schema or value >= schema["minimum"])
            and ("maximum" not in schema or value <= schema["maximum"])
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
            and len(value if kind == "string" else "") >= (schema.get("minLength", 0))
            and ("enum" not in schema or value in schema["enum"])
            and ("pattern" not in schema or re.search(schema["pattern"], value) is not None))


def test_schema_covers_every_printed_setting_and_pyyaml_reads_the_types(schema, tmp_path):
    (tmp_path / "a.yaml").write_text("{}\n")
    printed = dict(fields_of_yaml(print_config(tmp_path / "a.yaml")))
    described = dict(fields_of_schema(schema))
    assert printed.keys() == described.keys()
    for name, value in printed.items():
        assert value == described[name]["default"], name
        assert type(value) is type(described[name]["default"]), name
        assert accepts(described[name], value), name
        assert described[name]["description"], name


def members_of(text, struct):
    """Names of the data members of a C++ struct whose body holds plain members and nested structs."""
    body = re.sub(r"//.*", "", text)
    start = re.search(r"struct " + struct + r" \{", body).end()
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(body[end], 0)
        end += 1
    body = body[start:end - 1]
    nested = re.compile(r"struct \w+ \{[^{}]*\}")
    return re.findall(r"(\w+)(?:\s*=[^;]*)?;", nested.sub("", body))


def test_schema_covers_every_member_of_the_structs(schema):
    config = (ROOT / "csrc/config/config.h").read_text()
    model = (ROOT / "csrc/models/model_options.h").read_text()
    task = (ROOT / "csrc/data/task_options.h").read_text()
    sections = {"run": (config, "RunConfig"), "data": (config, "DataConfig"), "train": (config, "TrainConfig"),
                "optim": (config, "OptimConfig"), "ckpt": (config, "CheckpointConfig"), "eval": (config, "EvalConfig"),
                "sample": (config, "SampleConfig"), "log": (config, "LogConfig"), "model": (model, "ModelOptions"),
                "model.mlstm": (model, "Mlstm"), "model.slstm": (model, "Slstm"), "model.lora": (model, "Lora"),
                "model.feed_forward": (model, "FeedForward"), "data.task": (task, "TaskOptions")}
    expected = set()
    for section, (text, struct) in sections.items():
        expected |= {f"{section}.{name}" for name in members_of(text, struct)}
    expected -= {name for name in sections if "." in name}  # members that are sections themselves
    assert {name for name, _ in fields_of_schema(schema)} == expected
    assert set(members_of(config, "Config")) == {name for name in sections if "." not in name} | {"origin"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_keep_the_schema_and_read_the_same_in_python(schema, path):
    described = dict(fields_of_schema(schema))
    own = yaml.safe_load(path.read_text())
    own.pop("base", None)
    printed = dict(fields_of_yaml(print_config(path)))
    for name, value in fields_of_yaml(own):
        assert accepts(described[name], value), (name, value)
        if name != "data.train":  # whose weights are filled in
            assert printed[name] == value, name


def test_text_survives_c_and_python(tmp_path):
    texts = ["null", "yes", "1e5", "~", "a: b", "# x", "it's \"so\"", "back\\slash", "tab\there", "line\nbreak", "größe 日本 😀",
             "", " lead", "0x10", "1_000", "12:30:45", "- a", "2024-01-01", "=", "<<", "\x85", "\u2028", "\ufeffx"]
    prompts = [text for text in texts if text]
    (tmp_path / "a.yaml").write_text(json.dumps({"sample": {"prompts": prompts}}, ensure_ascii=False), encoding="utf-8")
    assert print_config(tmp_path / "a.yaml")["sample"]["prompts"] == prompts
    for text in texts:
        assert print_config(tmp_path / "a.yaml", f"data.text={text}")["data"]["text"] == text


@pytest.mark.parametrize("value", ["3e-4", "1.0e-5", "0.1", "5e-324", "1.7976931348623157e308", "123456.789", "2"])
def test_numbers_print_so_that_python_reads_the_same_double(tmp_path, value):
    (tmp_path / "a.yaml").write_text(f"optim: {{eps: {value}}}\n")
    printed = print_config(tmp_path / "a.yaml")["optim"]["eps"]
    assert isinstance(printed, float) and printed == float(value)


def test_errors_are_one_line_with_exit_status_2(tmp_path):
    (tmp_path / "a.yaml").write_text("train:\n  max_stps: 5\n")
    done = tool("print", tmp_path / "a.yaml", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{tmp_path}/a.yaml:2: train.max_stps: unknown key; did you mean train.max_steps?\n"


def test_numbers_do_not_depend_on_the_locale(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {learning_rate: 1.5e-3}\n")
    done = subprocess.run([TOOL, "print", tmp_path / "a.yaml"], capture_output=True, text=True,
                          env={"LC_ALL": "de_DE.UTF-8", "LANG": "de_DE.UTF-8"})
    assert "learning_rate: 0.0015 " in done.stdout


def test_help_names_every_setting(schema):
    text = tool("help").stdout
    for name, _ in fields_of_schema(schema):
        assert f"\n  {name} " in text
