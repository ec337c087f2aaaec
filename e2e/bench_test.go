// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// BenchmarkThroughVault compares reads through a real Vault: the engine's cached token
// with and without a lease, KV version 1 (which is part of Vault and reads storage), and
// a plugin that does nothing. It prints a table. Compare the ratios between machines, not
// the numbers.
func BenchmarkThroughVault(b *testing.B) {
	const (
		rounds = 7
		length = time.Second
	)
	w := newWorldIn(b, harness.StartQuietVault(b, vaultBinary, pluginDir))
	if err := harness.BuildTool(pluginDir, "noop-plugin"); err != nil {
		b.Fatal(err)
	}
	w.vault.Register(b, pluginDir, "noop-plugin", "noop-plugin", "v1.2.3")
	w.vault.Enable(b, "noop", "noop-plugin", "v1.2.3")
	if err := w.vault.Sys().Mount("kv", &api.MountInput{Type: "kv", Options: map[string]string{"version": "1"}}); err != nil {
		b.Fatal(err)
	}
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.write("roles/leased", role(map[string]any{"generate_lease": true}))
	data := w.read("creds/app").Data
	w.read("creds/leased")
	if _, err := w.vault.Logical().Write("kv/app", data); err != nil {
		b.Fatal(err)
	}

	targets := []struct{ name, path string }{
		{"no-op plugin", "noop/creds/app"},
		{"mojoauth, cached", "mojoauth/creds/app"},
		{"mojoauth, leased", "mojoauth/creds/leased"},
		{"KV version 1", "kv/app"},
	}
	b.ResetTimer()
	for range b.N {
		table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(table, "connections\ttarget\trequests/s\tp50\tp99\tof no-op (median of rounds)\t")
		for _, connections := range []int{1, 32} {
			// Interleaved, to make other load on the machine affect all of them alike.
			results := make([][]load, len(targets))
			for range rounds {
				for i, target := range targets {
					results[i] = append(results[i], generate(b, w.vault, target.path, connections, length))
				}
			}
			for i, target := range targets {
				var ratios, rates []float64
				var p50, p99 []time.Duration
				for r, result := range results[i] {
					ratios = append(ratios, result.rate/results[0][r].rate)
					rates = append(rates, result.rate)
					p50, p99 = append(p50, result.p50), append(p99, result.p99)
				}
				fmt.Fprintf(table, "%d\t%s\t%.0f\t%s\t%s\t%.3f\t\n", connections, target.name,
					median(rates), median(p50).Round(time.Microsecond), median(p99).Round(time.Microsecond), median(ratios))
			}
		}
		if err := table.Flush(); err != nil {
			b.Fatal(err)
		}
	}
}

func median[T cmp.Ordered](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

type load struct {
	rate     float64 // requests per second
	p50, p99 time.Duration
}

// generate reads a path over the given number of connections for the given time.
func generate(t testing.TB, vault *harness.Vault, path string, connections int, length time.Duration) load {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: connections}}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()

	var mu sync.Mutex
	var all []time.Duration
	var wg sync.WaitGroup
	began := time.Now()
	for range connections {
		wg.Go(func() {
			var latencies []time.Duration
			for ctx.Err() == nil {
				req, err := http.NewRequest(http.MethodGet, vault.Address()+"/v1/"+path, nil)
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("X-Vault-Token", vault.Token())
				sent := time.Now()
				resp, err := client.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					t.Errorf("%s: status %d", path, resp.StatusCode)
					return
				}
				latencies = append(latencies, time.Since(sent))
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, latencies...)
		})
	}
	wg.Wait()
	took := time.Since(began)
	if len(all) == 0 {
		t.Fatalf("%s: no request succeeded", path)
	}
	slices.Sort(all)
	return load{
		rate: float64(len(all)) / took.Seconds(),
		p50:  all[len(all)/2],
		p99:  all[len(all)*99/100],
	}
}
