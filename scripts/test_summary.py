"""Adds up the JUnit files of a test run: failed and skipped tests with their reasons, then the closing line."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main(folder: Path) -> int:
    passed, failed, skipped = 0, [], []
    programs = {}  # CTest's own verdict on each test program, to notice one that died before writing its file
    for path in sorted(folder.glob("*.xml")):
        try:
            cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        except ElementTree.ParseError:
            cases = []
        if not cases and path.name != "ctest.xml":
            failed.append((f"test_{path.stem}", "the program died before it wrote its results"))
            continue
        for case in cases:
            name = f"{case.get('classname') or path.stem}: {case.get('name')}"
            bad = case.find("failure") if case.find("failure") is not None else case.find("error")
            skip = case.find("skipped")
            if path.name == "ctest.xml":
                programs[case.get("name")] = bad is None and case.get("status") != "fail"
            elif bad is not None:
                failed.append((name, (bad.get("message") or bad.text or "").strip()))
            elif skip is not None:
                skipped.append((name, (skip.get("message") or "no reason given").strip()))
            else:
                passed += 1
    for program, good in programs.items():
        if not good and not any(name.startswith(f"test_{program}") for name, _ in failed):
            failed.append((f"test_{program}", "the program failed; see build/Testing/Temporary/LastTest.log"))
    for name, why in skipped:
        print(f"skipped  {name}\n         {why.splitlines()[0]}")
    for name, why in failed:
        print(f"FAILED   {name}\n         {why.splitlines()[0] if why else ''}")
    if passed + len(failed) + len(skipped) == 0:
        print("no test ran: nothing carries this label on this machine yet")
    print(f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
