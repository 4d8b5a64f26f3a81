"""A page as Markdown and as HTML: nothing that a file says becomes markup."""

from PIL import Image as Pillow

from reporting.page import BulletList, Heading, Image, Paragraph, Table, to_html, to_markdown

HOSTILE = '<script>alert(1)</script> & "quotes" {{ 7 * 7 }} {% raw %}'


def test_every_text_is_escaped_in_every_block(tmp_path):
    Pillow.new("RGB", (2, 2)).save(tmp_path / "a.png")
    blocks = [
        *(Heading(HOSTILE), Paragraph(HOSTILE), BulletList([HOSTILE]), Image("a.png", HOSTILE, HOSTILE)),
        Table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], HOSTILE),
    ]
    page = to_html(HOSTILE, blocks, tmp_path)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 12  # title twice, five blocks
    assert page.count("{{ 7 * 7 }}") == 12
    assert 'alt="&lt;script' in page
    assert "<script" not in to_markdown(HOSTILE, blocks).replace("\\<", "")


def test_a_table_as_markdown():
    table = Table(["a|b", "n"], [["x\ny", "1.0"], ["*", ""]], "Title_1.", labels=1)
    assert to_markdown("T", [table]) == (
        "# T\n\nTitle_1.\n\n| a\\|b   |   n |\n|:-------|----:|\n| x y    | 1.0 |\n| \\*     |     |\n"
    )
    assert "| a" in to_markdown("T", [Table(["a", "b"], [], "None.")])


def test_a_table_as_html(tmp_path):
    table = Table(["a", "n", "m"], [["x", "y", "1"], ["z", "", "2"], ["w", "", "3"]], "T.", labels=2, summary=1)
    page = to_html("T", [table], tmp_path)
    assert '<th>a</th><th>n</th><th class="number">m</th>' in page
    assert '<tr><th scope="row">x</th><td>y</td><td class="number">1</td></tr>' in page
    assert '<tr class="summary first"><th scope="row">z</th>' in page
    assert '<tr class="summary"><th scope="row">w</th>' in page
    words = to_html("T", [Table(["a", "b"], [["x", "y"]], "T.", labels=2)], tmp_path)
    assert '<table class="words">' in words
