"""Our model in lm-evaluation-harness answers what the harness's own Hugging Face model answers."""

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.evaluation.hellaswag import make_hellaswag
from gpt2_jax.evaluation.hellaswag_items import read_items
from gpt2_jax.generation.decode import generate
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import END_OF_TEXT, decode, encode
from parity.models import Models, random_models
from parity.outcomes import Check, Prove, bounded

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from gpt2_jax.interop.lm_eval import GPT2LM  # noqa: E402

CONTEXT = 96
# Nats a token. A loss here is about 11 nats, whose last digit in float32 is 1e-6; the harness adds
# losses up in float32 as well.
BOUND = 1e-5

ODD = "naïve café, Straße, Ελλάδα, 你好世界, नमस्ते, 👩‍👩‍👧‍👦 e\u0301 \u200b \u00a0 \x00 \x1c \u2028"
PAIRS = [
    ("The cat sat on", " the mat"),
    ("The cat sat on", " the mat."),
    ("The cat sat on", " a"),
    ("The cat sat on", "!"),
    ("The cat sat on ", "the mat"),
    ("The cat sat on  ", "the mat"),
    ("The cat sat on\n", "\n the mat"),
    ("The cat sat on \t\n", "it"),
    ("", "The cat sat on the mat"),
    ("", " the"),
    ("", "T"),
    ("", f"{END_OF_TEXT}The cat"),
    (END_OF_TEXT, "The cat"),
    (f"one{END_OF_TEXT}two", f" three{END_OF_TEXT}"),
    (ODD, ODD[:20]),
    (ODD[:9], ODD[9:]),
    ("e", "\u0301 \u200d"),
    ("1234567", "890"),
    ("x = ", "'''  \n\n'''"),
    ("Is it?\nAnswer:", " yes"),
    ("Is it?\nAnswer:", " no"),
    ("Is it?\nAnswer:", " yes it is"),
    ("Is it?\nAnswer:", " yes it was"),
    ("a " * 90, "b c d"),
    ("a " * 100, "b c d"),
    ("a " * 100, "b c d e"),
    ("a b c " * 100, " a b c"),
    ("a b c" * 30, " d" * CONTEXT),
    ("a b c", " d" * (CONTEXT - 1)),
    ("", " one two three" * (CONTEXT // 3)),
]


@pytest.fixture(scope="module")
def models() -> Models:
    """Random weights with GPT-2's vocabulary, large enough that losses differ by many nats."""
    config = GPT2Config(
        n_positions=CONTEXT,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return random_models(config, seed=3)


@pytest.fixture(scope="module")
def theirs(models: Models, gpt2_tokenizer: Any) -> Any:
    # Its cache takes one text cut at two places for the same request, and then scores the shorter
    # continuation at the wrong positions: a text of seven words, again and again, shows it.
    return HFLM(
        pretrained=models.huggingface, tokenizer=gpt2_tokenizer, batch_size=8, logits_cache=False
    )


@pytest.fixture(scope="module")
def ours(models: Models) -> GPT2LM:
    return GPT2LM((models.params, models.config), batch_size=8)


def requests(kind: Any, arguments: Sequence[tuple]) -> list[Any]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def likeliest_endings(models: Models) -> list[tuple[str, str]]:
    """Contexts and the words that the model itself would write next."""
    contexts = [f"This is sentence {number} of" for number in range(20)]
    prompts = [encode(context).tolist() for context in contexts]
    made = generate(models.params, models.config, prompts, max_new_tokens=2)
    return [
        (context, decode(tokens))
        for context, prompt, tokens in zip(contexts, prompts, made, strict=True)
        if encode(context + decode(tokens)).tolist() == prompt + tokens
    ]


def equal_things(name: str, ours: Sequence[Any], theirs: Sequence[Any], what: str) -> Check:
    pairs = list(zip(theirs, ours, strict=True))
    details = tuple(f"{index}: {b!r}, not {a!r}" for index, (a, b) in enumerate(pairs) if a != b)
    counted = f"{len(pairs) - len(details)} of {len(pairs)} {what} equal"
    return Check(name, len(details), 0, (len(pairs),), counted=counted, details=details[:8])


def bounded_by_token(
    name: str, theirs: Sequence[float], ours: Sequence[float], texts: Sequence[str]
) -> Check:
    """Compares sums over the tokens of texts."""
    tokens = np.array([len(encode(text, allow_end_of_text=True)) for text in texts])
    return bounded(name, np.array(theirs) / tokens, np.array(ours) / tokens, BOUND)


def test_tokens(ours: GPT2LM, theirs: Any, prove: Prove) -> None:
    texts = ["", *itertools.chain(*PAIRS)]
    tokens, expected = ([lm.tok_encode(text) for text in texts] for lm in (ours, theirs))
    prove(equal_things("lm-eval: tokens", tokens, expected, "texts"))
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    assert ours.max_length == theirs.max_length


def test_loglikelihood(models: Models, ours: GPT2LM, theirs: Any, prove: Prove) -> None:
    """Contexts that many share, empty and too long ones, in no order and some twice."""
    pairs = [*PAIRS, *likeliest_endings(models), *PAIRS[:10]]
    order = np.random.default_rng(0).permutation(len(pairs))
    asked = requests("loglikelihood", [pairs[index] for index in order])
    assert len(asked) > 45
    answers = ours.loglikelihood(asked, disable_tqdm=True)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    our_sums, our_greedy = zip(*answers, strict=True)
    their_sums, their_greedy = zip(*expected, strict=True)
    texts = [request.args[1] for request in asked]
    assert np.std(their_sums) > 100
    assert 5 < sum(their_greedy) < len(asked) - 5
    prove(
        bounded_by_token("lm-eval: log-likelihoods, nats a token", their_sums, our_sums, texts),
        equal_things("lm-eval: greedy", our_greedy, their_greedy, "answers"),
    )


def test_loglikelihood_rolling(ours: GPT2LM, theirs: Any, prove: Prove) -> None:
    """Texts shorter than the context, as long, and several times longer."""
    words = ["The", "quick", "brown", "fox", "jumps", "over", "it"]
    texts = ["a", END_OF_TEXT, ODD] + [
        " ".join(itertools.islice(itertools.cycle(words), count))
        for count in (40, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 500)
    ]
    assert CONTEXT in {len(encode(text)) for text in texts}
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    answers = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    name = "lm-eval: rolling log-likelihoods, nats a token"
    prove(bounded_by_token(name, expected, answers, texts))


@pytest.mark.parametrize(
    "arguments",
    [
        {"until": ["\n\n"], "max_gen_toks": 24},
        {"until": ["e", " th", "in"], "max_gen_toks": 30, "do_sample": False},
        {"until": "a", "max_new_tokens": 60, "temperature": 0.0},
        {"until": [], "max_tokens": 3, "num_beams": 1},
    ],
)
def test_generate_until(arguments: dict[str, Any], ours: GPT2LM, theirs: Any, prove: Prove) -> None:
    """Greedy texts; two contexts are longer than the room there is for them."""
    contexts = [f"{context} {number}" for number, (context, _) in enumerate(PAIRS[:8])]
    contexts += [ODD, "a b c " * 40, "All the words " * 30, "x", "The cat sat on"]
    asked = requests("generate_until", [(context, arguments) for context in contexts])
    texts = ours.generate_until(asked, disable_tqdm=True)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(texts)) > 5
    prove(equal_things("lm-eval: greedy texts", texts, expected, "texts"))


def evaluate(lm: Any, *tasks: dict[str, Any]) -> dict[str, Any]:
    # Reading the harness's own thousands of tasks takes seconds.
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), bootstrap_iters=0, task_manager=manager)


def task_of(rows: list[dict[str, Any]], **task: Any) -> dict[str, Any]:
    """A task of the harness on rows at hand: nothing is fetched, and nothing kept."""
    import datasets

    data = datasets.Dataset.from_list(rows)
    return {**task, "custom_dataset": lambda **_: datasets.DatasetDict(validation=data)}


def test_tasks_of_every_kind(ours: GPT2LM, theirs: Any, prove: Prove) -> None:
    """Through all of the harness: few-shot prompts, requests, filters, metrics."""
    rows = [{"text": f"{first} {second}.", "last": second} for first, second in PAIRS[:10]]
    common = {"validation_split": "validation", "doc_to_text": "{{text}}"}
    tasks = [
        task_of(
            rows,
            task="texts",
            output_type="loglikelihood_rolling",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
            **common | {"doc_to_text": ""},
        ),
        task_of(
            rows,
            task="endings",
            output_type="loglikelihood",
            doc_to_target="{{last}}",
            metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
            **common,
        ),
        task_of(
            rows,
            task="answers",
            output_type="generate_until",
            doc_to_target="{{last}}",
            num_fewshot=1,
            fewshot_split="validation",
            generation_kwargs={"until": ["e"], "max_gen_toks": 12},
            metric_list=[{"metric": "exact_match"}],
            **common,
        ),
    ]
    found, expected = (evaluate(lm, *map(dict, tasks)) for lm in (ours, theirs))
    for task, name in [
        ("texts", "bits_per_byte,none"),
        ("texts", "word_perplexity,none"),
        ("endings", "perplexity,none"),
    ]:
        metrics = (np.log(results["results"][task][name]) for results in (expected, found))
        prove(bounded("lm-eval: logarithm of a task's metric", next(metrics), next(metrics), BOUND))
    answers, texts = (
        [sample["resps"] for sample in results["samples"]["answers"]]
        for results in (expected, found)
    )
    prove(equal_things("lm-eval: greedy texts", texts, answers, "texts"))


@pytest.mark.slow
def test_hellaswag(shared: Path, models: Models, ours: GPT2LM, prove: Prove) -> None:
    """The harness's task through our class, and `make_hellaswag` by the harness's protocol."""
    file = shared / "data/hellaswag_val.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        items = [json.loads(line) for line in itertools.islice(lines, 500)]
    folder = Path(lm_eval.__file__).parent / "tasks/hellaswag"
    # Its texts and metrics on our copy of its items; no split of it is fetched.
    task = load_yaml(folder / "hellaswag.yaml") | {"dataset_path": None, "training_split": None}
    found = evaluate(ours, task_of(items, **task))["results"]["hellaswag"]
    score_items = make_hellaswag(
        GPT2(models.config),
        read_items(file, limit=500),
        batch_size=16,
        protocol="lm-evaluation-harness",
    )
    score = score_items(models.params).score
    theirs = [round(500 * found[name]) for name in ("acc,none", "acc_norm,none")]
    ours_too = [round(500 * share) for share in (score.acc, score.acc_norm)]
    assert len(set(theirs)) == 2
    prove(equal_things("lm-eval: HellaSwag, items right of 500", ours_too, theirs, "counts"))
