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

// This file has the paths that show operators what a node does: status, for people, and
// metrics, for Prometheus.

func (b *backend) pathStatus() []*framework.Path {
	return []*framework.Path{
		{
			Pattern:      "status$",
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "status"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.statusRead,
					Summary:      "Read this node's status: version, cached tokens, mints, and failures.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields: map[string]*framework.FieldSchema{
							"version":       {Type: framework.TypeString, Required: true, Description: "Version of the plugin."},
							"commit":        {Type: framework.TypeString, Required: true, Description: "Commit that the plugin was built from."},
							"started_at":    {Type: framework.TypeString, Required: true, Description: "When this node started to serve the mount, as an RFC 3339 time in UTC."},
							"cached_tokens": {Type: framework.TypeInt64, Required: true, Description: "Number of cached tokens that may be served."},
							"reads":         {Type: framework.TypeMap, Required: true, Description: "Number of reads of creds/<role> by outcome: hit, refreshed, minted, restored, forwarded, stale, or error."},
							"mints":         {Type: framework.TypeInt64, Required: true, Description: "Number of tokens minted for reads, renewals, and rotations."},
							"mint_failures": {Type: framework.TypeMap, Required: true, Description: "Number of failed mints by error class."},
							"configs":       {Type: framework.TypeMap, Required: true, Description: "State of each config, by name. Has those of these keys that apply: last_mint_at, last_error, last_error_class, last_error_at, next_attempt_at, requests_waiting, requests_per_second (the current pace), peak_requests_per_second (since started_at, or since token_url changed), peak_requests_per_second_last_hour. Times are RFC 3339 times in UTC."},
						},
					}}},
				},
			},
			HelpSynopsis:    "Read this node's status.",
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
			HelpSynopsis:    "Read this node's metrics.",
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
		// Vault's own metrics do not cover a plugin's process.
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
		// This must be a string: an empty []byte does not survive the plugin's gRPC.
		logical.HTTPRawBody: text.String(),
	}}, nil
}

const statusHelp = `
Shows what this node has done since it started to serve the mount. Other nodes of the
cluster have their own numbers. No token or secret is shown.

For each config, it shows when a token was last minted (last_mint_at), the last failure
(last_error, last_error_class, last_error_at), when the next token request is allowed
(next_attempt_at), how many token requests wait for a turn (requests_waiting), the
current pace (requests_per_second), and the peaks (peak_requests_per_second,
peak_requests_per_second_last_hour).

Reads are counted by outcome: hit (a fresh token from memory), restored (from storage),
minted (a new token), refreshed (a new token, though the old one was still usable),
stale (the old token), forwarded (to the active node, which counts the read too), and
error.
`

const metricsHelp = `
Returns the numbers of "status" in the Prometheus text format. Scrape
/v1/<mount>/metrics with a Vault token, or read it with curl: "vault read" fails because
it expects JSON.

The metrics also cover memory, goroutines, and open files of the plugin process, which
all mounts of this plugin version on the node share.
`
