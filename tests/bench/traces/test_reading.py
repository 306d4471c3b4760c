"""Trace files: the three formats, and what is said of broken ones."""

from pathlib import Path

import pytest

from prism.bench.traces.reading import read_trace, write_trace
from prism.common.errors import PrismError

pytestmark = pytest.mark.core


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_prisms_own_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,model,prompt_tokens,output_tokens\n1.5,b,20,7\n0.5,a,10,3\n")
    trace = read_trace([path])
    assert trace.models == ("a", "b")
    assert list(trace.arrival_s) == [0.5, 1.5]
    assert list(trace.model) == [0, 1]
    assert list(trace.prompt_tokens) == [10, 20]
    assert list(trace.output_tokens) == [3, 7]


def test_azure_is_one_service_a_file(tmp_path: Path) -> None:
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    code = write(tmp_path, header + "2023-11-16 18:17:03.9799600,4808,10\n", "code.csv")
    chat = write(tmp_path, header + "2023-11-16 18:17:04.4799600,374,44\n", "chat.csv")
    trace = read_trace([code, chat])
    assert [trace.models[index] for index in trace.model] == ["code", "chat"]
    assert list(trace.arrival_s) == pytest.approx([0.0, 0.5], abs=1e-6)
    assert list(trace.prompt_tokens) == [4808, 374]


def test_burstgpt_without_its_failed_requests(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,GPT-4,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n",
    )
    trace = read_trace([path])
    assert trace.models == ("ChatGPT", "GPT-4")
    assert list(trace.arrival_s) == [5.0, 118.0]
    assert list(trace.output_tokens) == [18, 276]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,model,prompt_tokens,output_tokens\n0.1234,m,1,2\n3,n,4,5\n")
    trace = read_trace([path])
    write_trace(trace, tmp_path / "again.csv")
    assert read_trace([tmp_path / "again.csv"]) == trace


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "line 1: columns a,b; known are arrival_s,"),
        ("", "line 1: columns nothing; known are"),
        (
            "arrival_s,model,prompt_tokens,output_tokens\n0,m,1,1\nx,m,1,1\n",
            "line 3: time 'x' is not a number",
        ),
        (
            "arrival_s,model,prompt_tokens,output_tokens\n-1,m,1,1\n",
            "line 2: time '-1': must be a number from 0",
        ),
        ("arrival_s,model,prompt_tokens,output_tokens\n0,m,1\n", "line 2: 3 fields where the header has 4"),
        ("arrival_s,model,prompt_tokens,output_tokens\n0,,1,1\n", "line 2: no model"),
        (
            "arrival_s,model,prompt_tokens,output_tokens\n0,m,many,1\n",
            "line 2: 'many' is not a number of tokens",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n",
            "line 2: TIMESTAMP 'yesterday' is neither",
        ),
        ("arrival_s,model,prompt_tokens,output_tokens\n", "no requests in it"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(PrismError, match=r"trace\.csv") as caught:
        read_trace([write(tmp_path, text)])
    assert complaint in caught.value.message


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="No such file"):
        read_trace([tmp_path / "none.csv"])
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PrismError, match=r"binary\.csv is not text"):
        read_trace([tmp_path / "binary.csv"])
