# Every target sets up what it needs. PYTHON chooses the interpreter of a new environment: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

BOOKS ?= ../shared/data/books
EVALS ?= ../shared/data/evals
JOBS ?= 2

.PHONY: help demo books compare-books evaluate-books test test-all lint bench gpu clean

help:
	@echo "make demo      train a small dense and a small Thoughtbubbles model and compare them (minutes on a CPU)"
	@echo "make compare-books BOOKS=FOLDER  train and compare the variants of docs/results/books.md (two hours on two CPU cores)"
	@echo "make evaluate-books BOOKS=FOLDER EVALS=FOLDER  train three models longer, evaluate, fine-tune two (five hours)"
	@echo "make test      the tests"
	@echo "make test-all  the tests with the long grids"
	@echo "make lint      ruff and mypy"
	@echo "make bench     speed, as JSON"
	@echo "make gpu       what one GPU shows of correctness, speed and a small comparison, in ten minutes"
	@echo "make clean     remove the environment"

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

# Prepared folders and finished runs are left as they are: the same call goes on where it stopped.
books: $(READY)
	$(BIN)/thoughtbubbles prepare runs/books-4k $(BOOKS)/train-0.parquet --validation $(BOOKS)/validation.parquet \
		--vocab-size 4096 --block-size 128 --limit-tokens 20_000_000

compare-books: books
	$(BIN)/thoughtbubbles prepare runs/books-4k-tuning $(BOOKS)/train-1.parquet --tokenizer runs/books-4k/tokenizer \
		--block-size 128 --limit-tokens 5_000_000
	$(BIN)/thoughtbubbles compare recipes/compare/books.yaml --jobs $(JOBS)

# docs/evaluation.md has the layout of EVALS. The dense model comes first, since the others are measured against it.
RUNS := runs/evaluate-books
SMALL = --data-dir $(EVALS) --tier small --batch-size 16
evaluate-books: books
	for model in dense budget-1 causal; do \
		case $$model in causal) budgets=1,2,4 ;; *) budgets=1 ;; esac; \
		case $$model in dense) against= ;; *) against="--against $(RUNS)/dense/evaluation" ;; esac; \
		$(BIN)/thoughtbubbles train recipes/evaluation/$$model.yaml && \
		$(BIN)/thoughtbubbles evaluate $(RUNS)/$$model --tasks lambada,hellaswag,blimp,piqa,wikitext $(SMALL) \
			--budget $$budgets --output $(RUNS)/$$model/evaluation $$against || exit 1; \
	done
	for model in dense causal; do \
		case $$model in dense) budgets=1; against= ;; \
			*) budgets=1,2,4; against="--against $(RUNS)/dense-gsm8k/evaluation" ;; esac; \
		$(BIN)/thoughtbubbles train recipes/evaluation/gsm8k.yaml model.pretrained=$(RUNS)/$$model \
			training.output=$(RUNS)/$$model-gsm8k data.source=$(EVALS)/gsm8k-train.parquet \
			training.eval_tasks_dir=$(EVALS) && \
		$(BIN)/thoughtbubbles evaluate $(RUNS)/$$model-gsm8k --tasks gsm8k --num-fewshot 0 $(SMALL) \
			--budget $$budgets --output $(RUNS)/$$model-gsm8k/evaluation $$against || exit 1; \
	done

test: $(READY)
	$(BIN)/python -m pytest -n auto -m "not long"

test-all: $(READY)
	$(BIN)/python -m pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/overheads.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/serving.py

gpu: $(READY)
	test -e kit/kit.json || $(BIN)/python scripts/gpu_kit.py kit $(if $(DATA),--data $(DATA))
	$(BIN)/python scripts/gpu.py --output runs/gpu --minutes 10

clean:
	rm -rf $(VENV)
