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

// vitals is what a plugin's process takes, by its own metrics.
type vitals struct {
	goroutines, files float64
	heap, resident    float64 // bytes
}

func (v vitals) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f open files, %.1f MiB of heap, %.1f MiB resident", v.goroutines, v.files, v.heap/(1<<20), v.resident/(1<<20))
}

// exceeds tells whether v is more than what a process that does not grow may be apart
// from before.
func (v vitals) exceeds(before vitals) bool {
	return v.goroutines > before.goroutines+10 || v.files > before.files+10 ||
		v.resident > before.resident*1.15+4<<20 || v.heap > before.heap*1.5+8<<20
}

// medianVitals is, for each of them, the middle one.
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

// vitals are those of the active node's plugin while nobody reads or writes: the median
// of a few.
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
		t.Fatalf("the metrics lack some of them: %v", v)
	}
	return v
}

// A cluster under load goes through random faults for SOAK_MINUTES, and the plugin does
// not grow: in the first half one process, which outlives the faults of that half; in
// the second the processes that the faults leave behind.
func TestSoak(t *testing.T) {
	minutes, err := strconv.ParseFloat(os.Getenv("SOAK_MINUTES"), 64)
	if err != nil {
		harness.Skip(t, "takes as long as SOAK_MINUTES says: run make soak")
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

	// Every gentle fault once and all the large roles, so that what is made once has been made.
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
		t.Error("it is another process")
	}
	if after.exceeds(before) {
		t.Error("the plugin grows")
	}

	var each []vitals
	for until := time.Now().Add(half); time.Now().Before(until) && !t.Failed(); {
		w.suffer(all[random.IntN(len(all))])
		each = append(each, w.vitals())
		t.Logf("          %v", each[len(each)-1])
	}
	third := len(each) / 3
	if third < 2 {
		t.Fatalf("only %d faults: SOAK_MINUTES is too few", len(each))
	}
	first, last := medianVitals(each[:third]), medianVitals(each[len(each)-third:])
	t.Logf("after %d faults that may end the process: %v; after the first ones: %v", len(each), last, first)
	if last.exceeds(first) {
		t.Error("the plugin grows")
	}
	w.noCanary()
}
