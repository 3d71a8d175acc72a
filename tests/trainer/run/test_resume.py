"""What a resumed run says of what has changed."""

from tests.contract.tiny import config
from trainer.loop import train


def start(path, *more):
    return train(*config("gpt2", "val_loss_every=0", f"output_dir={path}", *more), path)


def test_another_row_length_says_how_much_text_is_read_twice_and_never(tmp_path, capsys):
    start(tmp_path, "num_iterations=20")
    capsys.readouterr()
    start(tmp_path, "num_iterations=21", "resume=auto", "train_seq_len=16")
    out = capsys.readouterr().out
    assert "changed since the checkpoint: train_seq_len 32 -> 16\n" in out
    (line,) = [line for line in out.splitlines() if "rows of another length" in line]
    twice, never = (float(word.rstrip("%")) for word in line.split() if word.endswith("%"))
    assert 1 < twice < 30 and 1 < never < 30


def test_another_batch_size_reads_on_without_a_gap(tmp_path, capsys):
    start(tmp_path, "num_iterations=2")
    capsys.readouterr()
    start(tmp_path, "num_iterations=3", "resume=auto", "global_batch_size=2")
    out = capsys.readouterr().out
    assert "global_batch_size 4 -> 2\n" in out and "read twice" not in out
