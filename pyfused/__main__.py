"""``python -m pyfused``: the facts that belong into a bug report."""

from . import build_info


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)


def main() -> None:
    info = build_info()
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name.replace('_', ' '):<{width}}  {_text(value)}")


if __name__ == "__main__":
    main()
