from ldae.markdown import markdown_table


def test_a_table_has_a_line_for_each_row_and_numbers_on_the_right():
    assert markdown_table(["", "n"], [["one", "1"]]) == "|  | n |\n| --- | --: |\n| one | 1 |\n"
    assert markdown_table(["a", "b"], [], text=2) == "| a | b |\n| --- | --- |\n"
