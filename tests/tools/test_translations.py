"""Translations of the nodes: as many as the English texts, in their own language, with what must not change unchanged.

That the English is what the schemas say, and that ComfyUI serves all of it, is tested on a host (host/test_server.py).
"""

import re
from collections import defaultdict

import pytest
from pulid_sdxl.tools import ROOT
from pulid_sdxl.tools.translations import LOCALES, flat, read

# Codes of ComfyUI's editor. Its menu has no German (1.58), though it ships German texts; 1.27 takes the browser's.
LANGUAGES = ("ar", "de", "es", "fa", "fr", "he", "it", "ja", "ko", "pt-BR", "ru", "tr", "zh", "zh-TW")
ENGLISH = {path: text for path, text in flat(read("en")) if path[0].startswith("PuLID_")}  # older nodes stay English
SENTENCES = [path for path in ENGLISH if path[-1] in ("tooltip", "description")]
SCRIPTS = {  # of letters that are not Latin
    "ar": r"[\u0621-\u064a]",
    "fa": r"[\u067e\u0686\u06a9\u06af\u06cc]",  # letters that Arabic writes otherwise or not at all
    "he": r"[\u05d0-\u05ea]",
    "ja": r"[\u3040-\u30ff]",
    "ko": r"[\uac00-\ud7a3]",
    "ru": r"[\u0430-\u044f]",
    "zh": r"[\u4e00-\u9fff]",
    "zh-TW": r"[\u4e00-\u9fff]",
}
# What a tooltip may say that is the same everywhere: paths, codes, sizes, numbers, versions.
TECHNICAL = re.compile(r"[\w%-]+(?:[./_-]+[\w%-]+)+|%\w+%|-?\d+|\bv1\b", re.ASCII)
NOT_TECHNICAL = {"non-commercial"}


@pytest.fixture(params=LANGUAGES)
def language(request):
    return request.param


@pytest.fixture
def texts(language):
    return dict(flat(read(language)))


def test_the_languages_are_these():
    assert {path.relative_to(LOCALES).as_posix() for path in LOCALES.rglob("*") if path.is_file()} == {
        f"{language}/nodeDefs.json" for language in ("en", *LANGUAGES)
    }


def test_every_text_is_translated_and_nothing_else(texts):
    assert list(texts) == list(ENGLISH)
    assert all(text.strip() == text != "" for text in texts.values())


def test_no_sentence_stayed_english(language, texts):
    for path in SENTENCES:
        if ENGLISH[path] == "IN_QUEUE, IN_PROGRESS or COMPLETED.":  # a list of names
            continue
        assert texts[path] != ENGLISH[path], path
        words = set(re.findall(r"[a-z]+", texts[path].lower(), re.ASCII))
        assert not words & {"the", "and", "with", "which", "from", "when"}, path
        assert re.search(SCRIPTS.get(language, ""), texts[path].lower()), path


@pytest.mark.parametrize(("language", "characters"), [("zh", "gb2312"), ("zh-TW", "big5")])
def test_chinese_is_simplified_or_traditional_and_not_both(language, characters):
    for path, text in flat(read(language)):
        try:
            text.encode(characters)
        except UnicodeEncodeError as problem:
            pytest.fail(f"{path}: {text[problem.start : problem.end]!r} in {text}")


def test_an_english_text_has_one_translation(texts):
    found = defaultdict(set)
    for path, text in ENGLISH.items():
        found[text].add(texts[path])
    assert {text: translations for text, translations in found.items() if len(translations) > 1} == {}


def test_tooltips_keep_paths_codes_and_numbers_and_call_inputs_by_their_translated_names(texts):
    names = {path[2]: texts[path] for path in ENGLISH if path[1] == "inputs" and path[-1] == "name"}
    for path in SENTENCES:
        for word in set(TECHNICAL.findall(ENGLISH[path])) - NOT_TECHNICAL:
            assert names.get(word, word) in texts[path], f"{path} has no {names.get(word, word)!r}"


def test_tooltips_call_nodes_by_their_translated_names(texts):
    for path in (path for path in ENGLISH if path[1:] == ("display_name",)):
        named = re.compile(rf"\b{re.escape(title(ENGLISH[path]).removeprefix('PuLID '))}\b")
        for sentence in SENTENCES:
            if named.search(ENGLISH[sentence]):
                assert title(texts[path]) in texts[sentence], f"{sentence} does not name {texts[path]!r}"


def title(display_name: str) -> str:
    """A node's name without what it is for: "Load PuLID (SDXL)" is called "Load PuLID"."""
    return display_name.partition(" (")[0]


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_editor_reads_no_text_as_a_template(language):
    # vue-i18n: {name}, @:link, one | two. https://vue-i18n.intlify.dev/guide/essentials/syntax.html
    for path, text in flat(read(language)):
        assert not set(text) & set("{}@|"), path
        assert not any("." in key for key in path), "the editor splits keys at dots"


PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
ITALIC = re.compile(r"(?<!\*)\*([^*\s][^*]*)\*(?!\*)")


def rows_of(page: str) -> list[str]:
    """The first cells of the page's table of inputs."""
    table = page.partition("| input |")[2].partition("\n\n")[0]
    return re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_has_the_name_of_its_node_and_a_row_for_each_input(page):
    node, text = read("en")[page.stem], page.read_text(encoding="utf-8")
    assert text.startswith(f"# {node['display_name']}\n")
    rows = [name for row in rows_of(text) for name in row.split(", ")]
    assert sorted(rows) == sorted(node["inputs"])


def skeleton(page: str) -> list[tuple]:
    """What is the same in every language, of each line: heading, table row, code, addresses, stress."""
    return [
        (
            re.match(r"#*", line)[0],
            line.count("|"),
            sorted(re.findall(r"`[^`]+`", line)),
            re.findall(r"\]\(\S+\)", line),
            line.count("**"),
            len(ITALIC.findall(line)),
        )
        for line in page.splitlines()
    ]


@pytest.mark.parametrize("language", ["ja", "zh"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_is_there_as_a_whole_and_calls_nodes_and_inputs_as_the_nodes_do(page, language):
    texts = {path: text for path, text in flat(read(language)) if path[-1] in ("name", "display_name")}
    names = {ENGLISH[path]: text for path, text in texts.items()}
    names |= {title(english): title(text) for english, text in names.items()}
    own = []  # what an older node calls itself, its inputs and its like: those stay English
    if page.stem not in read(language):
        older = [node for name, node in read("en").items() if name not in read(language)]
        own = [*read("en")[page.stem]["inputs"], *(node["display_name"] for node in older)]
    names |= {name: name for name in own}
    english, text = (path.read_text(encoding="utf-8") for path in (page, page.with_suffix("") / f"{language}.md"))
    assert text.startswith(f"# {names[read('en')[page.stem]['display_name']]}\n")
    assert skeleton(text) == skeleton(english)
    for row, translated in zip(rows_of(english), rows_of(text), strict=True):
        assert translated == ", ".join(name if name in own else f"{names[name]} ({name})" for name in row.split(", "))
    for line, translated in zip(english.splitlines(), text.splitlines(), strict=True):
        called = ITALIC.findall(translated)
        assert [names[word] for word in ITALIC.findall(line) if word in names and names[word] not in called] == []
