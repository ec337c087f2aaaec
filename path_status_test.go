// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"bytes"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// aBadDay sets up a mount whose config has minted, failed, and is in a back-off.
func aBadDay(m *testMount) {
	m.random = func() float64 { return 0 }
	m.write("config/unused", testConfig(nil))
	m.configure("app", nil)
	m.wantToken("app", 1)
	m.wantToken("app", 1)
	m.creds("nobody", nil)
	m.write("roles/bad", map[string]any{"scopes": "x"})
	m.mojo.set(func(s *standIn) {
		s.fail = &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}
	})
	m.creds("bad", nil)
	m.mojo.set(func(s *standIn) { s.fail = errDown })
	time.Sleep(45 * time.Minute) // the renewal fails
	synctest.Wait()
	m.wantToken("app", 1) // a read counted as stale
}

func TestStatusReportsWhatTheNodeDid(t *testing.T) {
	bubble(t, func(m *testMount) {
		began := time.Now()
		aBadDay(m)
		got := m.read("status")
		failed := formatTime(time.Now().Add(-time.Second))
		configs := got["configs"].(map[string]any)
		next, err := time.Parse(time.RFC3339, configs["default"].(map[string]any)["next_attempt_at"].(string))
		if wait := time.Until(next); err != nil || wait < 28*time.Second || wait > 30*time.Second {
			t.Errorf("next_attempt_at is in %s, %v", wait, err)
		}
		delete(configs["default"].(map[string]any), "next_attempt_at")
		want := map[string]any{
			"version":       "v0.0.0-dev",
			"commit":        "unknown",
			"started_at":    formatTime(began),
			"cached_tokens": int64(1),
			"reads":         map[string]any{"hit": int64(1), "refreshed": int64(0), "minted": int64(1), "restored": int64(0), "forwarded": int64(0), "stale": int64(1), "error": int64(2)},
			"mints":         int64(1),
			"mint_failures": map[string]any{"request_refused": int64(1), "server_error": int64(4)},
			"configs": map[string]any{
				"unused": map[string]any{},
				"default": map[string]any{
					"last_mint_at":     formatTime(began),
					"last_error":       "MojoAuth failed (HTTP 503)",
					"last_error_class": "server_error",
					"last_error_at":    failed,

					"requests_waiting":                   0,
					"requests_per_second":                5.0,
					"peak_requests_per_second":           2,
					"peak_requests_per_second_last_hour": 2,
				},
			},
		}
		for key := range want {
			if !reflect.DeepEqual(got[key], want[key]) {
				t.Errorf("%s: got %v, want %v", key, got[key], want[key])
			}
		}
		if len(got) != len(want) {
			t.Errorf("got the keys of %v", got)
		}

		m.do(logical.DeleteOperation, "config", nil)
		if configs := m.read("status")["configs"].(map[string]any); len(configs) != 1 {
			t.Errorf("after a delete: got %v", configs)
		}
	})
}

func (m *testMount) metrics() string {
	m.t.Helper()
	resp, err := m.HandleRequest(m.t.Context(), &logical.Request{Operation: logical.ReadOperation, Path: "metrics", Storage: m.storage})
	if err != nil {
		m.t.Fatal(err)
	}
	if got := resp.Data[logical.HTTPContentType]; !strings.HasPrefix(got.(string), "text/plain; version=0.0.4") {
		m.t.Errorf("got content type %v", got)
	}
	if got := resp.Data[logical.HTTPStatusCode]; got != http.StatusOK {
		m.t.Errorf("got status %v", got)
	}
	return resp.Data[logical.HTTPRawBody].(string) // not []byte: Vault turns an empty one into a 500
}

func TestMetricsMatchStatus(t *testing.T) {
	m := newTestMount(t)
	problems, err := promlint.New(strings.NewReader(m.metrics())).Lint()
	if err != nil || len(problems) != 0 {
		t.Errorf("an idle mount's metrics: %v, %v", problems, err)
	}

	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		aBadDay(m)
		got := m.metrics()
		for _, line := range []string{
			`mojoauth_build_info{commit="unknown",goversion="go`,
			`mojoauth_reads_total{outcome="hit"} 1`,
			`mojoauth_reads_total{outcome="minted"} 1`,
			`mojoauth_reads_total{outcome="stale"} 1`,
			`mojoauth_reads_total{outcome="error"} 2`,
			`mojoauth_reads_total{outcome="refreshed"} 0`,
			`mojoauth_mints_total{config="default",result="ok"} 1`,
			`mojoauth_mints_total{config="default",result="no_turn"} 0`,
			`mojoauth_requests_total{config="default",result="answered"} 6`,
			`mojoauth_requests_total{config="default",result="throttled"} 0`,
			`mojoauth_requests_total{config="default",result="no_answer"} 0`,
			`mojoauth_requests_waiting{config="default"} 0`,
			`mojoauth_requests_per_second{config="default"} 5`,
			`mojoauth_requests_per_second_limit{config="default"} 20`,
			`mojoauth_peak_requests_per_second{config="default"} 2`,
			`mojoauth_peak_requests_per_second_last_hour{config="default"} 2`,
			`mojoauth_mints_total{config="unused",result="ok"} 0`,
			`mojoauth_mints_total{config="default",result="request_refused"} 1`,
			`mojoauth_mints_total{config="default",result="server_error"} 4`,
			`mojoauth_mint_duration_seconds_count 6`,
			`mojoauth_cached_tokens 1`,
			`mojoauth_due_tokens 1`,
			`mojoauth_due_token_servable_seconds 839.8`,
			`mojoauth_config_in_backoff{config="default"} 1`,
			`mojoauth_config_last_mint_timestamp_seconds{config="default"} 9.466848e+08`,
			`go_goroutines `,
			`go_memstats_heap_inuse_bytes `,
		} {
			if !strings.Contains(got, "\n"+line) {
				t.Errorf("no line %s… in\n%s", line, got)
			}
		}
		if strings.Contains(got, `"app`) || strings.Contains(got, `"bad`) {
			t.Errorf("a role's name is a label:\n%s", got)
		}
		problems, err := promlint.New(strings.NewReader(got)).Lint()
		if err != nil || len(problems) != 0 {
			t.Errorf("lint: %v, %v", problems, err)
		}
	})
}

// An outage logs one line when it begins and one when it ends, no matter what the readers
// do.
func TestLogReportsChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lockedBuffer
		mojo := &standIn{lifetime: time.Hour}
		m := newTestMountWith(t, mojo, mojo.client)
		if err := m.Setup(t.Context(), &logical.BackendConfig{
			StorageView: m.storage, Logger: hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Debug}), System: logical.TestSystemView(),
		}); err != nil {
			t.Fatal(err)
		}
		lines := func(with string) int {
			synctest.Wait() // until everything in progress is logged
			n := 0
			for line := range strings.Lines(log.String()) {
				if strings.Contains(line, with) {
					n++
				}
			}
			return n
		}
		m.configure("app", nil)
		m.wantToken("app", 1)
		if lines("[DEBUG] minted a token: config=default role=app") != 1 {
			t.Errorf("no line for the mint:\n%s", log.String())
		}
		time.Sleep(58 * time.Minute) // the token lapses after one renewal
		synctest.Wait()
		m.mojo.set(func(s *standIn) { s.fail = errDown })
		m.write("roles/app", map[string]any{"audience": "x"})
		for range 600 {
			m.creds("app", nil)
			time.Sleep(time.Second)
		}
		if lines("[WARN]") != 1 || lines("failed to mint a token: config=default role=app class=server_error") != 1 {
			t.Errorf("want one line for the outage:\n%s", log.String())
		}
		m.mojo.set(func(s *standIn) { s.fail = &mintError{class: classTimeout, allowed: time.Second} })
		for range 60 {
			m.creds("app", nil)
			time.Sleep(time.Second)
		}
		if lines("[WARN]") != 2 || lines("class=timeout") != 1 {
			t.Errorf("want one more line when the failure changes:\n%s", log.String())
		}
		m.mojo.set(func(s *standIn) { s.fail = nil })
		for range 60 {
			m.creds("app", nil)
			time.Sleep(time.Second)
		}
		// A refusal of what a single caller requested is not logged as a warning.
		m.write("roles/app", map[string]any{"scopes": "a,b"})
		m.mojo.set(func(s *standIn) {
			s.failFor = func(req tokenRequest) error {
				if len(req.scopes) == 1 {
					return &mintError{class: classRequestRefused, oauthError: "invalid_scope", status: http.StatusBadRequest}
				}
				return nil
			}
		})
		m.creds("app", map[string]any{"scopes": "a"})
		if lines("[WARN]") != 2 || lines("[DEBUG] failed to mint a token: config=default role=app class=request_refused") != 1 {
			t.Errorf("want a refused scope subset at debug level:\n%s", log.String())
		}
		m.mojo.set(func(s *standIn) { s.failFor = nil })
		if lines("[INFO]  minting succeeds again: config=default role=app") != 1 {
			t.Errorf("want one line when the outage is over:\n%s", log.String())
		}

		m.write("roles/bad", map[string]any{"scopes": "x"})
		m.mojo.set(func(s *standIn) {
			s.fail = &mintError{class: classRequestRefused, status: 400, oauthError: "invalid_scope"}
		})
		for range 120 {
			m.creds("bad", nil)
			time.Sleep(time.Second)
		}
		if lines("role=bad class=request_refused") != 1 {
			t.Errorf("want one line for a refused request:\n%s", log.String())
		}
		if strings.Contains(log.String(), canary) || strings.Contains(log.String(), "token-1") {
			t.Errorf("the log contains a secret:\n%s", log.String())
		}
	})
}

// lockedBuffer is a buffer that can be written and read concurrently.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Totals belong to the mount: a counter that goes down looks like a restart.
func TestStatusTotalsOutliveTheirConfigs(t *testing.T) {
	bubble(t, func(m *testMount) {
		aBadDay(m)
		before := m.read("status")
		m.do(logical.DeleteOperation, "config", nil)
		time.Sleep(time.Hour)
		for range 2 {
			after := m.read("status")
			for _, key := range []string{"mints", "mint_failures"} {
				if !reflect.DeepEqual(after[key], before[key]) {
					t.Errorf("%s: got %v, was %v before the config was deleted", key, after[key], before[key])
				}
			}
			if configs := after["configs"].(map[string]any); len(configs) != 1 {
				t.Errorf("got the configs %v, want only the existing one", configs)
			}
		}
		// A config that is created again starts from zero.
		m.write("config", testConfig(nil))
		if got := m.read("status")["configs"].(map[string]any)["default"]; !reflect.DeepEqual(got, map[string]any{}) {
			t.Errorf("a config that was created again has %v", got)
		}
	})
}

// An account is kept as long as its config exists, no matter who asks.
func TestAccountIsDeletedWithItsConfig(t *testing.T) {
	bubble(t, func(m *testMount) {
		m.configure("app", nil)
		m.wantToken("app", 1)
		if got := m.telemetry.snapshot(nil); len(got) != 0 {
			t.Errorf("got %v, want nothing for a config that is not listed", got)
		}
		if got := m.telemetry.snapshot([]string{"default"})["default"].results[resultOK]; got != 1 {
			t.Errorf("got %d mints, want 1", got)
		}
		m.elsewhere(func(other *testMount) { other.do(logical.DeleteOperation, "config", nil) }, "config/default")
		synctest.Wait()
		if got := m.kept().accounts; got != 0 {
			t.Errorf("got %d accounts of deleted configs, want 0", got)
		}
	})
}
