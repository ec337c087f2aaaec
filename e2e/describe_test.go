// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"io"
	"net"
	"strings"
	"testing"
)

// Vault's help and OpenAPI document for the engine.
func TestDescriptions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for path, words := range map[string][]string{
		"":             {"MojoAuth", "config", "roles/<name>", "creds/<name>"},
		"config":       {"token_url", "client_secret", "verify_connection", "Updates merge"},
		"config/other": {"token_url", "client_secret", "name (string)", "lower case"},
		"config/":      {`Listing "config/"`},
		"roles/app":    {"audience", "scopes", "extra_params", "generate_lease", "Updates merge"},
		"roles/":       {"List"},
		"creds/app":    {"role", "ttl", "memory", "min_ttl", "scopes"},

		"rotate-role/app": {"role", "dropped on every node"},
		"status":          {"next_attempt_at", "No token"},
		"metrics":         {"Prometheus", "curl"},
	} {
		out, err := w.vault.CLI(t.Context(), "path-help", "mojoauth/"+path)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, word := range words {
			if !strings.Contains(out, word) {
				t.Errorf("path-help mojoauth/%s does not contain %q:\n%s", path, word, out)
			}
		}
		if strings.Contains(out, "<no value>") || strings.Contains(out, "No help") {
			t.Errorf("path-help mojoauth/%s has a gap:\n%s", path, out)
		}
	}

	resp, err := w.vault.Logical().ReadRawWithData("mojoauth/", map[string][]string{"help": {"1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var help struct {
		OpenAPI struct {
			Paths map[string]map[string]json.RawMessage
		}
	}
	if err := json.Unmarshal(content, &help); err != nil {
		t.Fatal(err)
	}
	var got []string
	for path, item := range help.OpenAPI.Paths {
		for _, method := range []string{"get", "post", "delete"} {
			raw, ok := item[method]
			if !ok {
				continue
			}
			var operation struct {
				OperationID string `json:"operationId"`
				Summary     string
				Responses   map[string]json.RawMessage
			}
			if err := json.Unmarshal(raw, &operation); err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(operation.OperationID, "mojoauth-") || operation.Summary == "" || len(operation.Responses) == 0 {
				t.Errorf("%s %s: id %q, summary %q, %d responses", method, path, operation.OperationID, operation.Summary, len(operation.Responses))
			}
			got = append(got, operation.OperationID)
		}
	}
	for _, id := range []string{
		"mojoauth-write-config", "mojoauth-read-config", "mojoauth-delete-config", "mojoauth-list-configs",
		"mojoauth-write-default-config", "mojoauth-read-default-config", "mojoauth-delete-default-config",
		"mojoauth-write-role", "mojoauth-read-role", "mojoauth-delete-role", "mojoauth-list-roles",
		"mojoauth-read-access-token", "mojoauth-rotate-role", "mojoauth-read-status", "mojoauth-read-metrics",
	} {
		n := 0
		for _, have := range got {
			if have == id {
				n++
			}
		}
		if n != 1 {
			t.Errorf("operation %s appears %d times in %q", id, n, got)
		}
	}
}

func toJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// mute returns the address of a server that accepts connections and never answers.
func mute(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { conn.Close() })
		}
	}()
	return listener.Addr().String()
}
