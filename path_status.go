// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"math"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// This file is where an operator sees what a node does: the paths status, to be
// read, and metrics, to be scraped.

func (b *backend) pathStatus() []*framework.Path {
	return []*framework.Path{
		{
			Pattern:      "status$",
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.statusRead,
					Summary:      "Read what this node does: version, cache, mints and failures.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields: map[string]*framework.FieldSchema{
							"version":       {Type: framework.TypeString, Required: true, Description: "Version of the plugin."},
							"commit":        {Type: framework.TypeString, Required: true, Description: "Commit the plugin was built from."},
							"started_at":    {Type: framework.TypeString, Required: true, Description: "When this node began to serve the mount: RFC 3339, UTC."},
							"cached_tokens": {Type: framework.TypeInt64, Required: true, Description: "Tokens in memory that may be served."},
							"reads":         {Type: framework.TypeMap, Required: true, Description: "Reads of creds by how they were answered: hit, refreshed, minted, restored, forwarded, stale, error."},
							"mints":         {Type: framework.TypeInt64, Required: true, Description: "Tokens that MojoAuth gave for reads, refreshes and rotations."},
							"mint_failures": {Type: framework.TypeMap, Required: true, Description: "Failed mints by the class of the failure."},
							"configs":       {Type: framework.TypeMap, Required: true, Description: "Per config: last_mint_at, last_error, last_error_class, last_error_at, next_attempt_at, requests_waiting, requests_per_second (the pace in force), peak_requests_per_second (since started_at, or since token_url changed), peak_requests_per_second_last_hour, where there is one. Times are RFC 3339, UTC."},
						},
					}}},
				},
			},
			HelpSynopsis:    "See what this node does.",
			HelpDescription: strings.TrimSpace(statusHelp),
		},
		{
			Pattern:      "metrics$",
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "metrics"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.metricsRead,
					Summary:      "Read this node's metrics in the Prometheus text format.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "Metrics in the Prometheus text format.",
						MediaType:   "text/plain",
					}}},
				},
			},
			HelpSynopsis:    "Scrape this node's metrics.",
			HelpDescription: strings.TrimSpace(metricsHelp),
		},
	}
}

func (b *backend) statusRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.configs.list(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	n := b.tokens.census()
	reads := make(map[string]any, len(outcomes))
	for i, how := range outcomes {
		reads[string(how)] = b.telemetry.reads[i].Load()
	}
	totals := b.telemetry.total()
	mints := totals[resultOK]
	failures, configs := map[string]any{}, map[string]any{}
	for result, count := range totals {
		if result != resultOK {
			failures[result] = count
		}
	}
	for _, name := range names {
		configs[name] = map[string]any{}
	}
	for name, c := range b.telemetry.snapshot(names) {
		state := map[string]any{}
		if !c.lastMint.IsZero() {
			state["last_mint_at"] = formatTime(c.lastMint)
		}
		if c.lastError != nil {
			state["last_error"] = c.lastError.Error()
			state["last_error_class"] = string(c.lastError.class)
			state["last_error_at"] = formatTime(c.lastFailed)
		}
		if next := n.nextAttempt(name); !next.IsZero() {
			state["next_attempt_at"] = formatTime(next)
		}
		if at, ok := n.gates[name]; ok {
			state["requests_waiting"] = at.Waiting
			state["requests_per_second"] = math.Round(at.Pace*100) / 100
			state["peak_requests_per_second"] = at.Peak
			state["peak_requests_per_second_last_hour"] = at.PeakHour
		}
		configs[name] = state
	}
	return &logical.Response{Data: map[string]any{
		"version":       runningVersion(),
		"commit":        Commit,
		"started_at":    formatTime(b.telemetry.startedAt),
		"cached_tokens": int64(n.cached),
		"reads":         reads,
		"mints":         mints,
		"mint_failures": failures,
		"configs":       configs,
	}}, nil
}

func (b *backend) metricsRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.configs.list(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	registry := prometheus.NewPedanticRegistry()
	for _, c := range []prometheus.Collector{
		collector{b.telemetry, b.tokens, names},
		b.telemetry.duration,
		// Vault's own metrics know nothing of a plugin's process.
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := registry.Register(c); err != nil {
			return nil, err
		}
	}
	families, err := registry.Gather()
	if err != nil {
		return nil, err
	}
	var text strings.Builder
	format := expfmt.NewFormat(expfmt.TypeTextPlain)
	encoder := expfmt.NewEncoder(&text, format)
	for _, family := range families {
		if err := encoder.Encode(family); err != nil {
			return nil, err
		}
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: string(format),
		logical.HTTPStatusCode:  http.StatusOK,
		// A string: over the plugin's gRPC, bytes may arrive as something else.
		logical.HTTPRawBody: text.String(),
	}}, nil
}

const statusHelp = `
What this node has done for the mount since it began to serve it, and how each
config fares: when it last gave a token (last_mint_at), what failed last
(last_error, last_error_class, last_error_at), when MojoAuth is asked again
(next_attempt_at), how many requests wait for their turn (requests_waiting), at what
pace they leave (requests_per_second), and the most that left in a second
(peak_requests_per_second, peak_requests_per_second_last_hour). Other nodes of a cluster
have their own numbers. No token and no secret is shown.

Reads are counted by how they were answered: hit (from memory), restored (from storage),
refreshed and minted (a new token), stale (the old token), forwarded (to the active node,
which counts them too), error.
`

const metricsHelp = `
The same numbers as in "status", as Prometheus scrapes them: text, not JSON, at
/v1/<mount>/metrics with a Vault token. Read with curl; "vault read" expects JSON.
Beside them are memory, goroutines and open files of the plugin's process, which all
mounts of this version on the node share.
`
