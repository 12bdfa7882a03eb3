help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | column -t -s '|'
run: setup ## Build pyro and run a real command in a real microVM
	cargo run --quiet --release -p pyro-cli -- run debian:12 -- git --version
test: setup ## Run every test, with real microVMs
	scripts/test.sh
test-firecracker: setup ## Run the conformance suite on real Firecracker guests
	scripts/test-firecracker.sh
test-qemu: setup ## Run cases of the conformance suite on a newer QEMU than the installed one
	scripts/test-qemu.sh
check: ## Format, lints, dependency policy, docs
	scripts/check.sh
chaos: setup ## Kill everything at random, FOR seconds (600) from a SEED
	scripts/chaos.sh
soak: setup ## Run the long forms of tests whose short ones are in `make test`
	scripts/soak.sh
fuzz: setup ## Feed every decoder of foreign bytes, FOR seconds each (20)
	scripts/fuzz.sh
wheel: setup ## Build the Python wheel
	scripts/wheel.sh
kernel: ## Build a guest kernel that starts faster than Debian's, and use it from then on
	cargo run --quiet --release -p pyro-cli -- env kernel --from "$$(scripts/kernel.sh)"
bench: setup ## Measure what SPECIFICATION.md promises
	scripts/bench.sh figures
bench-start: setup ## Measure how soon a sandbox is there, and what it takes of memory
	scripts/bench.sh start
bench-network: setup ## Measure what a guest's network costs
	scripts/bench.sh network
bench-mcp: setup ## Measure what the MCP server adds to the engine's own time
	scripts/bench.sh mcp
bench-python: setup ## Measure what a call from Python costs
	scripts/bench.sh python
setup: ## Install what a fresh Debian machine lacks
	@scripts/setup.sh
.PHONY: help run test test-firecracker test-qemu check chaos soak fuzz wheel kernel bench bench-start bench-network bench-mcp bench-python setup
