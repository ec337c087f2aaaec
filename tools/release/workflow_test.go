// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package release

import (
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const workflowFile = "../../.github/workflows/release.yml"

type workflow struct {
	Permissions map[string]string
	Jobs        map[string]job
}

type job struct {
	Needs       any
	Environment string
	Permissions map[string]string
	Uses        string
	Steps       []struct {
		Uses string
		Run  string
		With map[string]any
		Env  map[string]string
	}
}

// needs returns the names of the jobs that must finish before j.
func (w workflow) needs(j string) (names []string) {
	var direct []string
	switch needs := w.Jobs[j].Needs.(type) {
	case string:
		direct = []string{needs}
	case []any:
		for _, name := range needs {
			direct = append(direct, name.(string))
		}
	}
	for _, name := range direct {
		names = append(append(names, name), w.needs(name)...)
	}
	return names
}

func loadWorkflow(t *testing.T) (w workflow, text string) {
	t.Helper()
	content, err := os.ReadFile(workflowFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(content, &w); err != nil {
		t.Fatal(err)
	}
	return w, string(content)
}

// Each job has only the permissions it needs.
func TestWorkflowPermissions(t *testing.T) {
	w, _ := loadWorkflow(t)
	if len(w.Permissions) != 0 {
		t.Errorf("got the permissions %v for every job, want none", w.Permissions)
	}
	want := map[string]map[string]string{
		"check":   {"contents": "read"},
		"test":    {"contents": "read"},
		"build":   {"contents": "read"},
		"sign":    {"contents": "read"},
		"attest":  {"id-token": "write", "attestations": "write"},
		"publish": {"contents": "write"},
	}
	for name, j := range w.Jobs {
		if !maps.Equal(j.Permissions, want[name]) {
			t.Errorf("job %s has the permissions %v, want %v", name, j.Permissions, want[name])
		}
		if (j.Environment != "") != (name == "sign") {
			t.Errorf("job %s has the environment %q; only sign may have one, with the key", name, j.Environment)
		}
	}
	if len(w.Jobs) != len(want) {
		t.Errorf("got %d jobs, want %d", len(w.Jobs), len(want))
	}
}

// Jobs with the key or with a write permission run nothing that was built or downloaded,
// except GitHub's own actions.
func TestNothingElseRunsWithTheKey(t *testing.T) {
	w, text := loadWorkflow(t)
	if got := strings.Count(text, "${{ secrets."); got != 1 {
		t.Errorf("the workflow names secrets %d times, want once", got)
	}
	foreign := regexp.MustCompile(`\b(go|make|goreleaser|npm|pip|curl|wget|docker|bin/\S+)\b`)
	for name, j := range w.Jobs {
		if name == "check" || name == "test" || name == "build" {
			for _, step := range j.Steps {
				if len(step.Env) != 0 {
					t.Errorf("job %s has the variables %v, want none", name, slices.Sorted(maps.Keys(step.Env)))
				}
			}
			continue
		}
		for _, step := range j.Steps {
			if found := foreign.FindString(step.Run); found != "" {
				t.Errorf("job %s runs %s in spite of its permissions", name, found)
			}
			if strings.HasPrefix(step.Uses, "actions/setup-") {
				t.Errorf("job %s uses %s", name, step.Uses)
			}
		}
	}
}

func TestWorkflowOrder(t *testing.T) {
	w, _ := loadWorkflow(t)
	for name, before := range map[string][]string{
		"test":    {"check"},
		"build":   {"test", "check"},
		"sign":    {"build", "test", "check"},
		"attest":  {"sign"},
		"publish": {"attest", "sign", "build", "check"},
	} {
		got := w.needs(name)
		for _, want := range before {
			if !slices.Contains(got, want) {
				t.Errorf("job %s does not wait for %s", name, want)
			}
		}
	}
	if len(w.Jobs["check"].Steps) == 0 || !strings.Contains(w.Jobs["check"].Steps[1].Run, `release.sh check "$GITHUB_REF_NAME"`) {
		t.Error("job check does not check the pushed tag")
	}
}

// An action's tag can be moved, a commit cannot.
func TestActionsArePinned(t *testing.T) {
	w, _ := loadWorkflow(t)
	pinned := regexp.MustCompile(`^actions/[a-z-]+@[0-9a-f]{40}$`)
	for name, j := range w.Jobs {
		for _, step := range j.Steps {
			if step.Uses != "" && !pinned.MatchString(step.Uses) {
				t.Errorf("job %s uses %s, want one of GitHub's actions pinned to a commit", name, step.Uses)
			}
			if strings.HasPrefix(step.Uses, "actions/checkout@") && step.With["persist-credentials"] != false {
				t.Errorf("job %s leaves its token in the clone", name)
			}
		}
	}
}
