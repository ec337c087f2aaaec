// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// needPrometheus skips a test on a machine without Prometheus. In CI, which installs it,
// the test fails instead.
func needPrometheus(t *testing.T) {
	t.Helper()
	for _, program := range []string{"prometheus", "promtool"} {
		if _, err := exec.LookPath(program); err != nil {
			harness.Missing(t, "%s is not on PATH (Debian has it in the package prometheus); not testing alerts and dashboard", program)
		}
	}
}

func monitoringFile(t *testing.T, name string) string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "deploy", "monitoring", name)
}

func TestAlertRules(t *testing.T) {
	t.Parallel()
	needPrometheus(t)
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = filepath.Dir(monitoringFile(t, "alerts.yml"))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
}

// A real Prometheus scrapes a real Vault with a token that can do nothing else. An
// outage's alerts fire, and every panel of the dashboard shows data.
func TestPrometheusScrapesVault(t *testing.T) {
	t.Parallel()
	needPrometheus(t)
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"max_retries": 0}))
	w.write("roles/app", role(nil))
	w.write("roles/second", role(nil))
	w.token("app")

	if err := w.vault.Sys().PutPolicy("metrics", `path "mojoauth/metrics" { capabilities = ["read"] }`); err != nil {
		t.Fatal(err)
	}
	scraper, err := w.vault.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{"metrics"}, NoParent: true})
	if err != nil {
		t.Fatal(err)
	}
	monitor, err := w.vault.Clone()
	if err != nil {
		t.Fatal(err)
	}
	monitor.SetToken(scraper.Auth.ClientToken)
	_, err = monitor.Logical().Read("mojoauth/status")
	w.wantError(err, 403)

	dir := t.TempDir()
	write := func(name, content string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	// The alert rules are unchanged, except for a shorter wait.
	rules, err := os.ReadFile(monitoringFile(t, "alerts.yml"))
	if err != nil {
		t.Fatal(err)
	}
	alerts := write("alerts.yml", strings.ReplaceAll(string(rules), "for: 1m\n", "for: 2s\n"))
	config := write("prometheus.yml", fmt.Sprintf(`
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [%q]
scrape_configs:
  - job_name: mojoauth
    metrics_path: /v1/mojoauth/metrics
    authorization: {type: Bearer, credentials_file: %q}
    static_configs: [{targets: [%q], labels: {mount: mojoauth}}]
`, alerts, write("token", scraper.Auth.ClientToken), strings.TrimPrefix(w.vault.Address(), "http://")))
	address := harness.StartPrometheus(t, config, dir)
	query := func(expr string) ([]map[string]string, error) {
		resp, err := http.Get(address + "/api/v1/query?query=" + url.QueryEscape(expr))
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		var answer struct {
			Status, Error string
			Data          struct {
				Result []struct{ Metric map[string]string }
			}
		}
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
			return nil, err
		}
		if answer.Status != "success" {
			return nil, fmt.Errorf("%s: %s", expr, answer.Error)
		}
		var series []map[string]string
		for _, result := range answer.Data.Result {
			series = append(series, result.Metric)
		}
		return series, nil
	}
	present := func(expr string) {
		t.Helper()
		harness.Eventually(t, expr, func() error {
			series, err := query(expr)
			if err == nil && len(series) == 0 {
				err = fmt.Errorf("no series")
			}
			return err
		})
	}
	present(`up{job="mojoauth"} == 1`)
	present(`mojoauth_mints_total{config="default", result="ok"} == 1`)
	present(`mojoauth_cached_tokens == 1`)

	// The secret is regenerated in MojoAuth, and Vault still has the old one.
	if err := w.oauth.SetClient(demoClient(clientID, "another-secret")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.vault.Logical().Read("mojoauth/creds/second"); err == nil {
		t.Fatal("got a token with a secret that is no longer valid")
	}
	present(`ALERTS{alertname="MojoAuthClientRefused", alertstate="firing", config="default", severity="critical"}`)
	present(`mojoauth_config_in_backoff{config="default"} == 1`)

	// A 60-second token that is due in an outage is near its floor.
	w.write("config", w.config(map[string]any{"client_secret": "another-secret"}))
	w.oauth.SetLifetime(60 * time.Second)
	w.token("second")
	w.oauth.SetFaults(oauthserver.Faults{Status: 503})
	present(`mojoauth_due_token_servable_seconds > 0`)
	present(`ALERTS{alertname="MojoAuthTokenNearItsFloor", alertstate="firing"}`)

	// Every panel now has data.
	content, err := os.ReadFile(monitoringFile(t, "grafana-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(content, &dashboard); err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("$job", "mojoauth", "$instance", ".*", "$__rate_interval", "1m")
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			series, err := query(fill.Replace(target.Expr))
			if err != nil || len(series) == 0 {
				t.Errorf("panel %q has no data: %s: %v", panel.Title, target.Expr, err)
			}
		}
	}
	if len(dashboard.Panels) < 5 {
		t.Errorf("got %d panels in the dashboard", len(dashboard.Panels))
	}
}
