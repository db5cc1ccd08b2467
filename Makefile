# The two commands a reader needs are `make book` and `make test`; `make help` lists the rest.
PYTHON ?= python3
NB ?= $(wildcard nbs/*.ipynb)
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS := 1
.DEFAULT_GOAL := help

.PHONY: help
help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' Makefile

.PHONY: book
book: $(READY)  ## build the book strictly: any warning is an error
	@rm -rf _build/html
	$(BIN)/jb build --all . -W -n --keep-going
	@echo; echo "The book: file://$(CURDIR)/_build/html/index.html"

.PHONY: test
test: $(READY)  ## run every notebook and compare it with what is stored; check library, book and pages
	$(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: store
store: export  ## re-run notebooks and store their outputs (NB=nbs/04_sampler.ipynb for one)
	printf '%s\n' $(NB) | xargs -n 1 -P 2 $(BIN)/python tools/store.py

.PHONY: export
export: $(READY)  ## write the library from the notebooks, and clean their metadata
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

.PHONY: lab
lab: $(READY)  ## open the notebooks in Jupyter
	$(BIN)/pip install -q -c constraints.txt -e '.[lab]'
	$(BIN)/jupyter lab nbs

.PHONY: shots
shots: book  ## photograph every page (light, dark, phone) into _build/shots
	$(BIN)/python tools/shots.py

.PHONY: clean
clean:  ## remove what was built, the environment included
	rm -rf .venv _build *.egg-info

$(READY): constraints.txt pyproject.toml settings.ini
	@command -v git >/dev/null || { echo "git is missing: install it first" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) -V 2>/dev/null || echo missing or broken). Try make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[book,test]'
	@touch $@
