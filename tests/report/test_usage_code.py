"""The Python code of a model card."""

from __future__ import annotations

import ast

import pytest

from runner.models.kernels.score_head import ScoreHead
from runner.report import usage_code
from runner.report.usage_code import Base, Use

LABELS = ScoreHead(("no", "yes"), "single_label_classification")
USES = [Use(True), Use(False), Use(True, LABELS), Use(False, LABELS), Use(True, reads_images=True)]
QUANTIZED = "BitsAndBytesConfig(load_in_4bit=True)"
BASES = [
    Base("owner/name"),
    Base("mine", is_local=True, is_configured=True, is_resized=True),
    Base("owner/name", quantization=QUANTIZED, is_configured=True),
    Base("", package=("package", "a.gguf"), is_configured=True),
    Base("", package=("package", "a.gguf"), quantization=QUANTIZED),
]


@pytest.mark.parametrize("use", USES)
def test_names_are_imported_or_made_before_they_are_used_and_none_in_vain(use: Use) -> None:
    for code in (usage_code.model(use), *(usage_code.adapter(use, base) for base in BASES)):
        known, imported, used = {"print", "dict", "zip", "max", "len"}, set[str](), set[str]()
        for statement in ast.parse(code).body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            used |= {node.id for node in names if isinstance(node.ctx, ast.Load)}
            assert used <= known, code
            known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
            if isinstance(statement, ast.ImportFrom):
                imported |= {alias.name for alias in statement.names}
                known |= imported
        assert imported <= used, code


def test_the_base_gets_its_configuration_and_quantization() -> None:
    code = usage_code.adapter(Use(True), BASES[2])
    assert "from_pretrained('owner/name', quantization_config=quantized, config=config)\n" in code
    assert "mine', config=config)  # replace by" in usage_code.adapter(Use(True), BASES[1])
    of_package = usage_code.adapter(Use(True), BASES[4])
    assert "from_pretrained(package, gguf_file='a.gguf')" in of_package
    assert 'from_pretrained("base", quantization_config=quantized)' in of_package


def test_a_model_that_reads_images_has_a_processor_and_is_asked_about_one() -> None:
    code = usage_code.adapter(Use(True, reads_images=True), BASES[1])
    assert "processor = AutoProcessor.from_pretrained(folder)" in code
    assert '"path": "a.png"' in code
    assert "len(processor.tokenizer)" in code
    assert "AutoTokenizer" not in code
