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

// needs are the jobs that have to be over before j, by their names.
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

// What each job may do, and no other may.
func TestRightsOfTheWorkflow(t *testing.T) {
	w, _ := loadWorkflow(t)
	if len(w.Permissions) != 0 {
		t.Errorf("every job has the permissions %v, want none", w.Permissions)
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
			t.Errorf("the job %s has the permissions %v, want %v", name, j.Permissions, want[name])
		}
		if (j.Environment != "") != (name == "sign") {
			t.Errorf("the job %s has the environment %q; only sign has one, with the key", name, j.Environment)
		}
	}
	if len(w.Jobs) != len(want) {
		t.Errorf("there are %d jobs, want %d", len(w.Jobs), len(want))
	}
}

// Where the key or a right to write is, nothing runs that was built or downloaded but
// for GitHub's own actions.
func TestNothingRunsBesideTheKey(t *testing.T) {
	w, text := loadWorkflow(t)
	if got := strings.Count(text, "${{ secrets."); got != 1 {
		t.Errorf("secrets are named %d times, want once", got)
	}
	foreign := regexp.MustCompile(`\b(go|make|goreleaser|npm|pip|curl|wget|docker|bin/\S+)\b`)
	for name, j := range w.Jobs {
		if name == "check" || name == "test" || name == "build" {
			for _, step := range j.Steps {
				if len(step.Env) != 0 {
					t.Errorf("the job %s has the variables %v, want none", name, slices.Sorted(maps.Keys(step.Env)))
				}
			}
			continue
		}
		for _, step := range j.Steps {
			if found := foreign.FindString(step.Run); found != "" {
				t.Errorf("the job %s runs %s beside what it may do", name, found)
			}
			if strings.HasPrefix(step.Uses, "actions/setup-") {
				t.Errorf("the job %s uses %s", name, step.Uses)
			}
		}
	}
}

func TestOrderOfTheWorkflow(t *testing.T) {
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
				t.Errorf("the job %s does not wait for %s", name, want)
			}
		}
	}
	if len(w.Jobs["check"].Steps) == 0 || !strings.Contains(w.Jobs["check"].Steps[1].Run, `release.sh check "$GITHUB_REF_NAME"`) {
		t.Error("the job check does not check the tag that was pushed")
	}
}

// A tag of an action can be moved, a commit cannot.
func TestActionsArePinned(t *testing.T) {
	w, _ := loadWorkflow(t)
	pinned := regexp.MustCompile(`^actions/[a-z-]+@[0-9a-f]{40}$`)
	for name, j := range w.Jobs {
		for _, step := range j.Steps {
			if step.Uses != "" && !pinned.MatchString(step.Uses) {
				t.Errorf("the job %s uses %s, want an action of GitHub's by its commit", name, step.Uses)
			}
			if strings.HasPrefix(step.Uses, "actions/checkout@") && step.With["persist-credentials"] != false {
				t.Errorf("the job %s leaves its token in the clone", name)
			}
		}
	}
}
