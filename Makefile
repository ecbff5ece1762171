# make demo        train the embedded model with QuZO on int8 codes (half a minute on two CPU cores)
# make test        the contracts, without network (one to two minutes on two CPU cores)
# make test-full   every test (four to eight minutes; a few more run on a GPU, and on the checkpoints of tests/README.md)
# make lint        ruff
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-full lint clean

demo: .venv/demo
	$(BIN)/python train.py

# Two workers, each with files of its own; threads of one worker's processes would wait for the other's
test test-full: export OMP_NUM_THREADS := 1
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

test: .venv/dev
	$(PYTEST) -m "not full"

test-full: .venv/dev
	$(PYTEST)

lint: .venv/dev
	$(BIN)/ruff check .

.venv/demo: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/dev: .venv/demo requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv
