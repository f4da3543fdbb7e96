import io

from rich.console import Console

from thoughtbubbles.support.tables import Table, console_table, markdown_table


def test_columns_are_aligned_right_but_for_those_named() -> None:
    assert markdown_table(["a", "b", "c"], [["x", "1", "y"]], left=(0, 2)) == (
        "| a | b | c |\n| --- | ---: | --- |\n| x | 1 | y |"
    )
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | ---: |"


def test_a_note_stands_below() -> None:
    table = Table("of it", ["a"], [["x"]], "said & done")
    assert table.markdown() == "| a |\n| --- |\n| x |\n\nsaid & done"
    assert table.html() == (
        '<div class="wide"><table>\n<tr><th>a</th></tr>\n<tr><td>x</td></tr>\n</table></div>'
        '<p class="note">said &amp; done</p>'
    )
    assert Table("", ["<a>"], [["&"]]).html() == (
        '<div class="wide"><table>\n<tr><th>&lt;a&gt;</th></tr>\n<tr><td>&amp;</td></tr>\n</table></div>'
    )


def test_sections_of_a_terminal_table_have_headings_where_they_are_named() -> None:
    table = console_table(["", "n"], [("First", [["a", "1"], ["bb", "22"]]), ("", [["c", "3"]])], box=None)
    shown = io.StringIO()
    Console(file=shown, width=40).print(table)
    lines = shown.getvalue().splitlines()
    assert [line.split() for line in lines] == [["n"], [], ["First"], ["a", "1"], ["bb", "22"], ["c", "3"]]
    assert lines[4].index("22") + 1 == lines[3].index("1") == lines[5].index("3")
