# Development tasks; `make help` lists them.

MODULE      := github.com/mojoauth/vault-plugin-secrets-mojoauth
NAME        := vault-plugin-secrets-mojoauth
VERSION     ?= 0.1.0-dev
OUT         := bin/$(NAME)
COMMIT      ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
LDFLAGS     := -s -w -X $(MODULE).Version=$(VERSION) -X $(MODULE).Commit=$(COMMIT)
GOLANGCI    := bin/golangci-lint
ACTIONLINT  := bin/actionlint
GORELEASER  := bin/goreleaser
GOVULNCHECK := bin/govulncheck
FUZZTIME    ?= 1m
FROM        ?= 1
SEEDS       ?= 1000
MINUTES     ?= 20

.PHONY: help build dev test test-unit test-e2e test-consumers test-live simulate fuzz lint vulncheck fmt bench soak soak-agent \
	image release-check release-snapshot release clean

help: ## List the tasks
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the plugin into bin/
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "$(LDFLAGS)" -o $(OUT) ./cmd/$(NAME)

dev: ## Run Vault or OpenBao (SERVER=) with the engine and read a token; AGENT=1 adds Agents
	@VERSION=$(VERSION) SERVER=$(SERVER) AGENT=$(AGENT) scripts/dev.sh

test: test-unit test-e2e ## Run all tests; SERVER=openbao|vault uses only that server

test-unit: ## Run the unit tests with the race detector
	@echo "Running the unit tests with the race detector. The first time, compiling takes about 3 minutes."
	go test -race ./...
	go test -run '^TestSimulation' . # more seeds, without the slow race detector

test-e2e: ## Run the end-to-end tests in OpenBao and Vault; SERVER=openbao|vault uses only that server
	@SERVER=$(SERVER) scripts/e2e.sh

test-consumers: ## Test programs that read tokens, such as External Secrets; SERVER=openbao|vault uses only that server
	@SERVER=$(SERVER) scripts/consumers.sh

test-live: ## Get a token from the real MojoAuth; needs the MOJOAUTH_* variables
	go test -count=1 -run '^TestLive' -v .

simulate: ## Simulate SEEDS cases of two nodes, starting at seed FROM; TRACE=1 prints all events
	FROM=$(FROM) SEEDS=$(SEEDS) TRACE=$(TRACE) go test -count=1 -timeout 2h -run '^TestSimulation$$' .

fuzz: ## Fuzz each target for FUZZTIME (default: 1m)
	@for package in . ./internal/redact; do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "==> $$target"; go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$package || exit; done; done

$(GOLANGCI): tools/lint/go.mod tools/lint/go.sum
	@echo "Building golangci-lint. The first time, this takes about 3 minutes on 2 cores."
	cd tools/lint && go build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(ACTIONLINT): tools/check/go.mod tools/check/go.sum
	cd tools/check && go build -o ../../$@ github.com/rhysd/actionlint/cmd/actionlint

lint: $(GOLANGCI) $(ACTIONLINT) ## Check code, modules, scripts and workflows
	go mod tidy -diff
	cd e2e && go mod tidy -diff
	cd e2e/consumers && go mod tidy -diff
	cd examples/go && go vet .
	for script in scripts/*.sh scripts/consumers/*.sh examples/curl/*.sh; do sh -n "$$script" || exit; done
	bash -n .ci/run
	$(GOLANGCI) run ./...
	cd e2e && ../$(GOLANGCI) run --config ../.golangci.yaml ./...
	cd e2e/consumers && ../../$(GOLANGCI) run --config ../../.golangci.yaml ./...
	cd tools/release && ../../$(GOLANGCI) run --config ../../.golangci.yaml ./sbom
	$(ACTIONLINT)

$(GOVULNCHECK): tools/check/go.mod tools/check/go.sum
	cd tools/check && go build -o ../../$@ golang.org/x/vuln/cmd/govulncheck

vulncheck: $(GOVULNCHECK) ## Check what the plugin calls for known vulnerabilities; uses vuln.go.dev
	$(GOVULNCHECK) ./...

fmt: $(GOLANGCI) ## Format the code
	$(GOLANGCI) fmt ./...
	cd e2e && ../$(GOLANGCI) fmt --config ../.golangci.yaml ./...
	cd e2e/consumers && ../../$(GOLANGCI) fmt --config ../../.golangci.yaml ./...
	cd tools/release && ../../$(GOLANGCI) fmt --config ../../.golangci.yaml ./sbom

bench: ## Run the benchmarks, also through a server (SERVER=, default: vault)
	go test -run '^$$' -bench . -benchmem .
	@echo "Running the benchmarks through a real server: about two minutes."
	@cd e2e && SERVER=$(or $(SERVER),vault) go test -run '^$$' -bench . -benchtime 1x .

soak: ## Run a cluster under load with random faults for MINUTES, and check that the plugin does not grow
	@echo "Running a cluster under load for $(MINUTES) minutes, plus the time to set it up."
	@cd e2e && SERVER=$(or $(SERVER),vault) SOAK_MINUTES=$(MINUTES) go test -count=1 -timeout $$(( $(MINUTES) + 30 ))m -run 'TestSoak$$' -v .

soak-agent: ## Run Agents through all faults for 12 token lifetimes (8 minutes)
	@cd e2e && SERVER=$(or $(SERVER),vault) AGENT_LIFETIMES=12 go test -count=1 -timeout 30m -run AgentKeeps -v .

image: ## Build the container image for Vault and OpenBao, with buildah, podman or docker
	@VERSION=$(VERSION) scripts/image.sh

$(GORELEASER): tools/release/go.mod tools/release/go.sum
	@echo "Building goreleaser. The first time, this takes about 5 minutes on 2 cores."
	cd tools/release && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o ../../$@ github.com/goreleaser/goreleaser/v2

bin/sbom: tools/release/go.mod tools/release/go.sum $(wildcard tools/release/sbom/*.go)
	cd tools/release && go build -o ../../$@ ./sbom

release-check: ## Check the release configuration, and that two builds are identical
	@echo "Checking the release configuration. The first time, this takes about a minute on 2 cores."
	cd tools/release && go test ./...
	@FRESH_CACHE=$(FRESH_CACHE) scripts/reproducible.sh

release-snapshot: $(GORELEASER) bin/sbom ## Build a release in dist/ without publishing it; GPG_FINGERPRINT signs it
	$(GORELEASER) check
	@VERSION=$(VERSION) GPG_FINGERPRINT=$(GPG_FINGERPRINT) scripts/release.sh snapshot

release: $(GORELEASER) bin/sbom ## Release TAG as a draft; needs gh, GITHUB_TOKEN, GPG_FINGERPRINT
	@GITHUB_TOKEN= GPG_FINGERPRINT= scripts/release.sh build "$(TAG)"
	@GITHUB_TOKEN= scripts/release.sh sign "$(TAG)"
	@scripts/release.sh publish "$(TAG)"

clean: ## Remove built files
	rm -rf bin dist
