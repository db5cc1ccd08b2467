"""Draw who imports whom: `python tools/imports.py` writes _static/imports.svg, the picture of the preface."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = {"0": ("Foundations", "#444"), "1": ("Health records", "#0072b2"), "2": ("Images", "#009e73"), "3": ("Attacks", "#b85c00"), "4": ("Beyond", "#7a4a94")}
WIDTH, HEIGHT, LEFT, DOWN = 96, 30, 104, 92


def graph():
    "Chapter number -> (module, the modules that it imports, without those that come with another)."
    numbers = {path.stem[3:]: path.stem[:2] for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}
    code = {name: ROOT / f"diffusion_lit/{name}.py" for name in numbers}
    direct = {name: set(re.findall(r"^ *from \.(\w+) import", path.read_text(), re.M)) - {"page"} for name, path in code.items() if path.exists() and name != "page"}
    def behind(name): return direct[name].union(*(behind(other) for other in direct[name]))
    return {numbers[name]: (name, sorted(others - set().union(*(behind(other) for other in others)))) for name, others in direct.items()}


def draw(modules):
    "The picture: a row for each part, an arrow from each module to those that are built on it."
    rows = {part: [number for number in modules if number[0] == part] for part in PARTS}
    rows = {part: numbers for part, numbers in rows.items() if numbers}
    wide, high = LEFT + max(map(len, rows.values())) * (WIDTH + 16), DOWN * len(rows)
    at = {modules[number][0]: (LEFT + i * (WIDTH + 16), 24 + j * DOWN) for j, numbers in enumerate(rows.values()) for i, number in enumerate(numbers)}
    lines, boxes = [], []
    for j, (part, numbers) in enumerate(rows.items()):
        name, colour = PARTS[part]
        boxes.append(f'<text x="10" y="{43 + j * DOWN}" font-size="13" font-weight="bold" fill="{colour}">{name}</text>')
        for number in numbers:
            module, others = modules[number]
            x, y = at[module]
            boxes.append(f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff" stroke="{colour}" stroke-width="1.6"/>'
                         f'<text x="{x + WIDTH / 2}" y="{y + 20}" font-size="13" text-anchor="middle" fill="#222">{module}</text>')
            for other in others:
                a, b = at[other]
                path = (f"M{a + WIDTH} {b + HEIGHT / 2}H{x}" if b == y and x - a == WIDTH + 16 else
                        f"M{a + WIDTH / 2} {b}C{a + WIDTH / 2} {b - 26} {x + WIDTH / 2} {b - 26} {x + WIDTH / 2} {y}" if b == y else
                        f"M{a + WIDTH / 2} {b + HEIGHT}C{a + WIDTH / 2} {b + HEIGHT + 40} {x + WIDTH / 2} {y - 40} {x + WIDTH / 2} {y}")
                lines.append(f'<path d="{path}"/>')
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="Helvetica, Arial, sans-serif" role="img">\n<title>Who imports whom</title>\n'
            f'<rect width="{wide}" height="{high}" rx="10" fill="#fdfdfb"/>\n<defs><marker id="to" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0 10 5 0 10z" fill="#888"/></marker></defs>\n<g fill="none" stroke="#888" stroke-width="1.1" marker-end="url(#to)">\n')
    return head + "\n".join(lines) + "\n</g>\n" + "\n".join(boxes) + "\n</svg>\n"


if __name__ == "__main__": (ROOT / "_static/imports.svg").write_text(draw(graph()))
