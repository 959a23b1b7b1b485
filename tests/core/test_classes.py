"""Class names that a file gives."""

from aftcli.core.classes import read_classes


def test_read_classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffäpfel\r\nred [b]pear[/b]\r\n猫, cat\r\n\r\n".encode())
    assert read_classes(path) == ("äpfel", "red [b]pear[/b]", "猫, cat")
