# Needs only Python 3.11 or newer; the rest is installed into .venv, pinned by constraints.txt.
#
#   make demo                     the whole job on rendered devices
#   make demo DATA=my/folder      the same job on your images
#   make test                     everything that is tested
#
# TORCH_INDEX=<url>: a package index that has the torch build you want, such as the one with the CPU build.
# PYTHON=<path>: the interpreter to use.

SHELL := /bin/bash
VENV ?= .venv
export VENV PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help demo test docs bench bench-retrieval bench-pretrain compare recipe weights-eval experiments images install install-dev prepare readme clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

# The rendered demo owns runs/demo: it goes on with an unfinished run and replaces a finished one. Results from your
# images are never replaced unless ARGS says so.
demo: install  ## the main job, to runs/demo; DATA=folder of your images, OUT=folder for results, ARGS=options of aoi demo
ifdef DATA
	@$(VENV)/bin/aoi demo "$(DATA)" --out "$(or $(OUT),runs/$$(basename "$(DATA)"))" $(ARGS)
else
	@$(VENV)/bin/aoi demo --out "$(or $(OUT),runs/demo)" $(if $(OUT),,$(if $(wildcard runs/demo/report.html),--overwrite)) $(ARGS)
endif

test: install-dev  ## everything that is tested; STEPS="house tests" for some of: house notebooks tests docs wheel browser
	@$(VENV)/bin/python tools/check.py $(STEPS)

docs: install-dev  ## the docs site, to _docs (with Quarto where it is on PATH, else with smalldocs)
	@$(VENV)/bin/python tools/build_docs.py
	@$(VENV)/bin/python tools/check_links.py

bench: install-dev  ## rendering and import figures
	@$(VENV)/bin/python tools/bench.py $(ARGS)

bench-pretrain: install-dev  ## pre-training against the plain ViTMAE loop of the transformers example: speed, memory, profile, bf16
	@$(VENV)/bin/python tools/bench_pretrain.py $(ARGS)

compare: install-dev  ## masked autoencoding, DINO, iBOT, Hiera and contrast on equal CPU seconds; prints the kept table, ARGS=--fresh runs it all anew
	@$(VENV)/bin/python tools/compare_objectives.py $(ARGS)
	@$(VENV)/bin/python tools/compare_objectives.py --study longer $(ARGS)

recipe: install-dev  ## the recipe of masked autoencoding, one thing changed at a time; then adapting against starting anew; ARGS=--fresh as above
	@$(VENV)/bin/python tools/compare_objectives.py --study recipe $(ARGS)
	@$(VENV)/bin/python tools/compare_objectives.py --study adapt $(ARGS)
	@if [ -d ../shared/data/deeppcb ]; then $(VENV)/bin/python tools/compare_objectives.py --study boards $(ARGS); fi

weights-eval: install-dev  ## the encoders that ship against raw pixels and a random one; ARGS="--ship NAME RUN" replaces them, --fresh counts anew
	@$(VENV)/bin/python tools/weights_eval.py $(ARGS)

# What is measured anew has a folder of its own, pictures included, so that nothing is read that was kept before. The same command goes on with a
# run that was broken off; remove the folder to begin again. Counts of boards stay where there are no boards to count on.
ANEW := build/fresh
FRESH ?= $(wildcard $(ANEW))
BOARDS := $(wildcard ../shared/data/deeppcb)

experiments: install-dev  ## execute the pages of experiments from kept counts; FRESH=1 measures all of them anew (hours), or goes on with that
	@$(if $(FRESH),test -d $(ANEW) && echo "Goes on with $(ANEW)." || { find nbs/experiments/results -name '*.csv' \
		$(if $(BOARDS),,! -name 'board*') -delete && mkdir -p $(ANEW); })
	@$(if $(FRESH),$(MAKE) compare recipe ARGS="--work $(ANEW)/pretraining")
	@$(if $(FRESH),$(MAKE) weights-eval ARGS="--work $(ANEW)/weights" && $(MAKE) bench-pretrain ARGS="--work $(ANEW)/bench_pretrain")
	@$(if $(FRESH),$(MAKE) bench-retrieval ARGS="--cache $(ANEW)/bench_retrieval")
	@$(if $(FRESH),for what in routing lists add; do \
		$(VENV)/bin/python tools/bench_bank.py $$what --pictures $(ANEW)/runs/arena --cache $(ANEW)/bench_bank || exit 1; done)
	@cd nbs/experiments && for page in *.ipynb; do $(if $(FRESH),AOI_RUNS="$(CURDIR)/$(ANEW)/runs") $(abspath $(VENV))/bin/jupyter nbconvert \
		--to notebook --execute --inplace --ExecutePreprocessor.timeout=-1 "$$page" || exit 1; done
	@$(if $(FRESH),rm -rf $(ANEW))

bench-retrieval: install-dev  ## what a large bank costs: JSON, table and figure; ARGS="--encoder folder" for other keys, --fresh to measure again what is kept
	@$(VENV)/bin/python tools/bench_retrieval.py $(ARGS)

images: install-dev  ## the pictures in nbs/images that no notebook draws, the widgets in headless Chromium; ARGS=new_device or widgets for some
	@$(VENV)/bin/python tools/make_images.py $(ARGS)

install:  ## make .venv and install aoi_ssl in it
	@tools/install.sh base

install-dev:  ## the same, with what developing it needs
	@tools/install.sh dev

prepare: install-dev  ## after editing notebooks: export modules, clean notebooks, write README.md
	@$(VENV)/bin/nbdev_export
	@$(VENV)/bin/python tools/strip_state.py
	@$(VENV)/bin/nbdev_clean
	@$(VENV)/bin/python tools/make_readme.py

readme: install-dev  ## README.md from nbs/index.ipynb
	@$(VENV)/bin/python tools/make_readme.py

clean:  ## remove what was made, .venv too; runs/ stays
	rm -rf $(VENV) build dist _docs _proc *.egg-info nbs/nbdev.yml nbs/sidebar.yml
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
