// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// vitals are the resources of a plugin's process according to its own metrics.
type vitals struct {
	goroutines, files float64
	heap, resident    float64 // bytes
}

func (v vitals) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f open files, %.1f MiB of heap, %.1f MiB resident", v.goroutines, v.files, v.heap/(1<<20), v.resident/(1<<20))
}

// exceeds reports whether v differs from before by more than it may for a process that
// does not grow.
func (v vitals) exceeds(before vitals) bool {
	return v.goroutines > before.goroutines+10 || v.files > before.files+10 ||
		v.resident > before.resident*1.15+4<<20 || v.heap > before.heap*1.5+8<<20
}

// medianVitals returns the median of each value.
func medianVitals(all []vitals) vitals {
	middle := func(of func(vitals) float64) float64 {
		var values []float64
		for _, v := range all {
			values = append(values, of(v))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return vitals{
		goroutines: middle(func(v vitals) float64 { return v.goroutines }),
		files:      middle(func(v vitals) float64 { return v.files }),
		heap:       middle(func(v vitals) float64 { return v.heap }),
		resident:   middle(func(v vitals) float64 { return v.resident }),
	}
}

// vitals returns the median of several measurements of the active node's plugin without
// reads or writes.
func (w *clusterWorld) vitals() vitals {
	w.Helper()
	w.reading.Lock()
	defer w.reading.Unlock()
	w.writing.Lock()
	defer w.writing.Unlock()
	client := w.clients[w.cluster.Active(w)]
	var all []vitals
	for range 9 {
		time.Sleep(time.Second / 5)
		all = append(all, scrapeVitals(w, client))
	}
	return medianVitals(all)
}

func scrapeVitals(t testing.TB, client *api.Client) vitals {
	t.Helper()
	resp, err := client.Logical().ReadRaw("mojoauth/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	values := make(map[string]float64)
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if name, value, ok := strings.Cut(lines.Text(), " "); ok {
			values[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	v := vitals{
		goroutines: values["go_goroutines"],
		files:      values["process_open_fds"],
		heap:       values["go_memstats_heap_inuse_bytes"],
		resident:   values["process_resident_memory_bytes"],
	}
	if v.goroutines == 0 || v.files == 0 || v.heap == 0 || v.resident == 0 {
		t.Fatalf("metrics are missing: %v", v)
	}
	return v
}

// A cluster under load goes through random faults for SOAK_MINUTES, and the plugin does
// not grow. The first half measures a single process, which survives that half's faults;
// the second half measures the processes that the faults leave behind.
func TestSoak(t *testing.T) {
	minutes, err := strconv.ParseFloat(os.Getenv("SOAK_MINUTES"), 64)
	if err != nil {
		harness.Skip(t, "takes SOAK_MINUTES; run make soak")
	}
	half := time.Duration(minutes * float64(time.Minute) / 2)
	w := newClusterWorld(t, pluginBinary, pluginVersion, chooseSeed(t))
	random := rand.New(rand.NewPCG(w.seed, 99))
	all := w.allFaults()
	var gentle []fault
	for _, f := range all {
		if f.gentle {
			gentle = append(gentle, f)
		}
	}

	// Each gentle fault and all large roles once, to allocate what is allocated only
	// once.
	for n := range 20 * writtenKeys {
		w.half.Store(int64(n % 2))
		if err := w.filler.writeLarge(); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range gentle {
		w.suffer(f)
	}
	process, before := w.plugin(), w.vitals()
	t.Logf("one process, before: %v", before)
	for until := time.Now().Add(half); time.Now().Before(until) && !t.Failed(); {
		w.suffer(gentle[random.IntN(len(gentle))])
		t.Logf("          %v", w.vitals())
	}
	after := w.vitals()
	t.Logf("one process, after %s: %v; before: %v", half, after, before)
	if !slices.Equal(w.plugin(), process) {
		t.Error("the process has changed")
	}
	if after.exceeds(before) {
		t.Error("the plugin has grown")
	}

	var each []vitals
	for until := time.Now().Add(half); time.Now().Before(until) && !t.Failed(); {
		w.suffer(all[random.IntN(len(all))])
		each = append(each, w.vitals())
		t.Logf("          %v", each[len(each)-1])
	}
	third := len(each) / 3
	if third < 2 {
		t.Fatalf("only %d faults: SOAK_MINUTES is too low", len(each))
	}
	first, last := medianVitals(each[:third]), medianVitals(each[len(each)-third:])
	t.Logf("after %d faults that may end the process: %v; after the first ones: %v", len(each), last, first)
	if last.exceeds(first) {
		t.Error("the plugin has grown")
	}
	w.noCanary()
}
