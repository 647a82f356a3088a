"""Compares what the conformance programs wrote on a device and in the emulator (tests/cuda/conformance.h has the format).

    python tests/cuda/compare_conformance.py DEVICE.txt HOST.txt [--all]

Prints a table of the cases that are not PASS (--all: every case), what was observed besides, and the counts. Exit 1 when
a case differs, failed to run or is missing on one side. A case that the device cannot run is SKIP.
"""

import argparse
import math
import struct
import sys

PROBE = "probe_"


class Case:
    def __init__(self, kind, text, absolute=0.0, relative=0.0, values=()):
        self.kind, self.text, self.absolute, self.relative, self.values = kind, text, absolute, relative, values


def read(path):
    """Name -> Case, and the observations; fails unless the file is whole."""
    cases, observed, end = {}, [], None

    def add(name, case):
        if name in cases and "ERROR" not in (case.kind, cases[name].kind):
            sys.exit(f"{path}: {name} is there twice")
        if name not in cases or case.kind == "ERROR":
            cases[name] = case

    with open(path) as file:
        for number, line in enumerate(file, 1):
            word, _, rest = line.rstrip("\n").partition(" ")
            name, _, rest = rest.partition(" ")
            if not word:
                continue
            if word == "INFO":
                observed.append((name, rest))
            elif word in ("SKIP", "ERROR"):
                add(name, Case(word, rest))
            elif word == "END":
                end = int(name)
            elif word == "CASE":
                case = parse(rest.split(" "))
                add(name, case or Case("ERROR", f"line {number} is damaged"))
            else:
                sys.exit(f"{path}:{number}: unknown line {word!r}")
    if end is None:
        sys.exit(f"{path}: incomplete, it has no END")
    found = len({*cases, *(name for name, _ in observed)})
    if found != end:
        sys.exit(f"{path}: {found} cases of {end}")
    return cases, observed


def parse(fields):
    """The Case of the fields behind a name; None when they do not fit together."""
    try:
        if fields[0] == "exact":
            count, values = int(fields[1]), [int(text, 16) for text in fields[2:]]
            return Case("exact", "", values=values) if len(values) == count > 0 else None
        if fields[0] == "near":
            count, values = int(fields[3]), [float(text) for text in fields[4:]]
            case = Case("near", "", float(fields[1]), float(fields[2]), values)
            return case if len(values) == count > 0 else None
    except (ValueError, IndexError):
        pass
    return None


def same(a, b, case):
    if case.kind == "exact":
        return a == b
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    if math.isinf(a) or math.isinf(b):
        return a == b
    return abs(a - b) <= case.absolute + case.relative * abs(b)


def show(value, kind):
    if kind == "near":
        return f"{value:.9g}"
    number = struct.unpack("f", struct.pack("I", value & 0xFFFFFFFF))[0]
    return f"{value:#x}" + (f" ({number:g})" if value > 0xFFFF and 1e-6 < abs(number) < 1e9 else "")


def compare(device, host):
    """PASS, FAIL or SKIP, and why."""
    if device is None or host is None:
        return "FAIL", "missing " + ("on the device" if device is None else "in the emulator")
    for side, case in (("device", device), ("emulator", host)):
        if case.kind == "ERROR":
            return "FAIL", f"{side}: {case.text}"
    if device.kind == "SKIP":
        return "SKIP", device.text
    if host.kind == "SKIP":
        return "FAIL", f"the emulator skipped it: {host.text}"
    limits = [(case.kind, case.absolute, case.relative, len(case.values)) for case in (device, host)]
    if limits[0] != limits[1]:
        return "FAIL", f"{limits[0]} here, {limits[1]} there: the programs are of different versions"
    wrong = [i for i, (a, b) in enumerate(zip(device.values, host.values)) if not same(a, b, device)]
    if not wrong:
        return "PASS", ""
    places = ", ".join(f"[{i}] {show(device.values[i], device.kind)} instead of {show(host.values[i], host.kind)}"
                       for i in wrong[:4])
    return "FAIL", f"{len(wrong)} of {len(device.values)} differ: {places}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("device")
    parser.add_argument("host")
    parser.add_argument("--all", action="store_true", help="print the cases that pass, too")
    arguments = parser.parse_args()
    device, seen = read(arguments.device)
    host, expected = read(arguments.host)
    names = [name for name in dict.fromkeys([*host, *device]) if not name.startswith(PROBE)]
    rows = [(name, *compare(device.get(name), host.get(name))) for name in names]
    count = {result: sum(row[1] == result for row in rows) for result in ("PASS", "FAIL", "SKIP")}
    for side, lines in (("device", seen), ("emulator", expected)):
        for name, text in lines:
            print(f"seen {side:8} {name}: {text}")
    for name, result, text in rows:
        if arguments.all or result == "FAIL":
            print(f"{result:4} {name:44} {text}".rstrip())
    for reason in dict.fromkeys(text for _, result, text in rows if result == "SKIP"):
        print(f"SKIP {sum(row[1:] == ('SKIP', reason) for row in rows)} cases: {reason}")
    print(f"{len(rows)} cases: {count['PASS']} PASS, {count['FAIL']} FAIL, {count['SKIP']} SKIP")
    if not rows or count["PASS"] == 0:
        print("nothing was compared")
        sys.exit(1)
    sys.exit(count["FAIL"] > 0)


if __name__ == "__main__":
    main()
