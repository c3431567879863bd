# Every target sets up what it needs first (see tools/bootstrap.py). Without make:
# python3 tools/bootstrap.py demo
#
#   make demo    train and compare ensembles on real data; table and figures in out/
#   make test    all tests and lint
#   make gpu     on a GPU machine: GPU tests, every bench, one file of results
#   make bench   the benches of this machine
#   make lint    ruff
#   make setup   the set-up alone
#
# ARGS passes options on: make test ARGS="-k combine -x"
PYTHON ?= python3
TARGETS := demo test gpu bench lint setup

.PHONY: $(TARGETS)
$(TARGETS):
	@$(PYTHON) tools/bootstrap.py $@ $(ARGS)
