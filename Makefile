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

dev: ## Run Vault or OpenBao (SERVER=) with the engine, and read a token; AGENT=1 adds Agents
	@VERSION=$(VERSION) SERVER=$(SERVER) AGENT=$(AGENT) scripts/dev.sh

test: test-unit test-e2e ## Run all tests; SERVER=openbao or SERVER=vault runs them in one server only

test-unit: ## Run the unit tests with the race detector
	@echo "Unit tests with the race detector; the first time, about 3 minutes of that is compiling."
	go test -race ./...
	go test -run '^TestSimulation' . # more seeds, as no race detector slows them down

test-e2e: ## Run the tests in a real OpenBao and a real Vault, or in the one of SERVER=openbao|vault
	@SERVER=$(SERVER) scripts/e2e.sh

test-consumers: ## Run what reads tokens, such as External Secrets, against real servers; SERVER= picks one
	@SERVER=$(SERVER) scripts/consumers.sh

test-live: ## Get a token of the real MojoAuth; needs the MOJOAUTH_* variables
	go test -count=1 -run '^TestLive' -v .

simulate: ## Simulate SEEDS cases of two nodes FROM a seed on; TRACE=1 tells all that happens
	FROM=$(FROM) SEEDS=$(SEEDS) TRACE=$(TRACE) go test -count=1 -timeout 2h -run '^TestSimulation$$' .

fuzz: ## Fuzz each target for a minute, or FUZZTIME
	@for package in . ./internal/redact; do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "==> $$target"; go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$package || exit; done; done

$(GOLANGCI): tools/lint/go.mod tools/lint/go.sum
	@echo "Building golangci-lint; the first time this takes about 3 minutes on 2 cores."
	cd tools/lint && go build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

$(ACTIONLINT): tools/check/go.mod tools/check/go.sum
	cd tools/check && go build -o ../../$@ github.com/rhysd/actionlint/cmd/actionlint

lint: $(GOLANGCI) $(ACTIONLINT) ## Check code, modules, scripts and workflows
	go mod tidy -diff
	cd e2e && go mod tidy -diff
	cd examples/go && go vet .
	for script in scripts/*.sh scripts/consumers/*.sh examples/curl/*.sh; do sh -n "$$script" || exit; done
	bash -n .ci/run
	$(GOLANGCI) run ./...
	cd e2e && ../$(GOLANGCI) run --config ../.golangci.yaml ./...
	cd tools/release && ../../$(GOLANGCI) run --config ../../.golangci.yaml ./sbom
	$(ACTIONLINT)

$(GOVULNCHECK): tools/check/go.mod tools/check/go.sum
	cd tools/check && go build -o ../../$@ golang.org/x/vuln/cmd/govulncheck

vulncheck: $(GOVULNCHECK) ## Look for known vulnerabilities in what the plugin calls; asks vuln.go.dev
	$(GOVULNCHECK) ./...

fmt: $(GOLANGCI) ## Format the code
	$(GOLANGCI) fmt ./...
	cd e2e && ../$(GOLANGCI) fmt --config ../.golangci.yaml ./...
	cd tools/release && ../../$(GOLANGCI) fmt --config ../../.golangci.yaml ./sbom

bench: ## Run the benchmarks; through Vault, or SERVER=openbao
	go test -run '^$$' -bench . -benchmem .
	@echo "Through a real server; about two minutes."
	@cd e2e && SERVER=$(or $(SERVER),vault) go test -run '^$$' -bench . -benchtime 1x .

soak: ## Run a cluster under load through random faults for MINUTES, and see that the plugin does not grow
	@echo "A cluster under load for $(MINUTES) minutes; setting up comes on top."
	@cd e2e && SERVER=$(or $(SERVER),vault) SOAK_MINUTES=$(MINUTES) go test -count=1 -timeout $$(( $(MINUTES) + 30 ))m -run 'TestSoak$$' -v .

soak-agent: ## Run Agents through all faults for 12 token lifetimes: 8 minutes
	@cd e2e && SERVER=$(or $(SERVER),vault) AGENT_LIFETIMES=12 go test -count=1 -timeout 30m -run AgentKeeps -v .

image: ## Build the image for Vault's containerised plugins and OpenBao's download, with buildah, podman or docker
	@VERSION=$(VERSION) scripts/image.sh

$(GORELEASER): tools/release/go.mod tools/release/go.sum
	@echo "Building goreleaser; the first time this takes about 5 minutes on 2 cores."
	cd tools/release && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o ../../$@ github.com/goreleaser/goreleaser/v2

bin/sbom: tools/release/go.mod tools/release/go.sum $(wildcard tools/release/sbom/*.go)
	cd tools/release && go build -o ../../$@ ./sbom

release-check: ## Check the release's description, and that two builds make the same bytes
	@echo "The release's description; the first time this takes about a minute on 2 cores."
	cd tools/release && go test ./...
	@FRESH_CACHE=$(FRESH_CACHE) scripts/reproducible.sh

release-snapshot: $(GORELEASER) bin/sbom ## Make a release in dist/ and publish nothing; GPG_FINGERPRINT signs it
	$(GORELEASER) check
	@VERSION=$(VERSION) GPG_FINGERPRINT=$(GPG_FINGERPRINT) scripts/release.sh snapshot

release: $(GORELEASER) bin/sbom ## Make TAG a release, as a draft; needs gh, GITHUB_TOKEN, GPG_FINGERPRINT
	@GITHUB_TOKEN= GPG_FINGERPRINT= scripts/release.sh build "$(TAG)"
	@GITHUB_TOKEN= scripts/release.sh sign "$(TAG)"
	@scripts/release.sh publish "$(TAG)"

clean: ## Remove what was built
	rm -rf bin dist
