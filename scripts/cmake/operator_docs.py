"""Writes what the headers of csrc/ops say of each operator into a JSON file, from which the Python package documents them.

    python scripts/cmake/operator_docs.py HEADER... > libxlstm_operators.json

{function: {"text": its comment, "structs": [{"text": a struct's comment, "fields": {name: its comment}}]}}, with the structs
that it takes. An error where a function has no comment.
"""

import json
import re
import sys
from pathlib import Path

COMMENT = r"(?P<comment>(?:^[ ]*///[^<\n][^\n]*\n|^[ ]*///\n)*)"
STRUCT = re.compile(COMMENT + r"^struct (?P<name>\w+) \{\n(?P<body>.*?)^\};", re.MULTILINE | re.DOTALL)
FUNCTION = re.compile(COMMENT + r"^(?!struct|namespace)[\w:<>, ]+? (?P<name>\w+)\((?P<arguments>[^;]*?)\);", re.MULTILINE)
FIELDS = re.compile(COMMENT + r"^ *(?!static)[\w:<>]+ (?P<declared>[^;/]+);(?P<behind>[ ]*///<[^\n]*)?", re.MULTILINE)


def text_of(comment):
    """A comment without its slashes, its lines as they are: equations stand in columns."""
    return "\n".join(re.sub(r"^ *///<? ?", "", line).rstrip() for line in comment.strip("\n").split("\n"))


def fields_of(body):
    fields = {}
    for found in FIELDS.finditer(body):
        text = " ".join(text_of(found["comment"] or found["behind"] or "").split("\n"))
        for declared in found["declared"].split(","):  # keys, values;
            fields[declared.split("=")[0].strip()] = text
    return fields


def operators_of(header):
    source = header.read_text()
    structs = {s["name"]: {"text": text_of(s["comment"]), "fields": fields_of(s["body"])} for s in STRUCT.finditer(source)}
    operators = {}
    for found in FUNCTION.finditer(source):
        if not found["comment"]:
            sys.exit(f"{header}: {found['name']} has no comment (///)")
        taken = [struct for name, struct in structs.items() if re.search(rf"\b{name}\b", found["arguments"])]
        operators[found["name"]] = {"text": text_of(found["comment"]), "structs": taken}
    return operators


if __name__ == "__main__":
    merged = {}
    for argument in sys.argv[1:]:
        merged.update(operators_of(Path(argument)))
    print(json.dumps(merged, indent=1))
