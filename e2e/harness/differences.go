// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import "time"

// Difference is a way in which OpenBao differs from Vault that a test or this harness
// must allow for. This file lists all of them. The text is the reason that a run prints
// for a skipped test.
type Difference string

// Observed with OpenBao 2.7.2 and Vault 1.21.0.
const (
	// The harness allows for these.

	AuditInConfiguration Difference = "OpenBao declares audit devices in its configuration file, and refuses them over the API; all nodes of a cluster would need the same options, so clusters have no audit device"
	NoFileStorage        Difference = "OpenBao has no file storage: a single node keeps its data in Raft"
	NoMemoryLock         Difference = "OpenBao does not lock memory, and warns about disable_mlock"
	PatientNodes         Difference = "OpenBao multiplies performance_multiplier by 3 s, Vault by 1 s"
	VariablesOfItsOwn    Difference = "bao reads BAO_ADDR, BAO_TOKEN and BAO_CACERT before the VAULT_ variables"

	// Tests check for these.

	NoPluginPins        Difference = "OpenBao has no plugin pins (sys/plugins/pins); only the mount's own version counts"
	Namespaces          Difference = "OpenBao has namespaces; Vault has them only in the Enterprise edition, and otherwise ignores their header"
	StandbysRead        Difference = "OpenBao's standbys run the plugin and serve reads themselves, for up to StandbyLag with what was there before a write; those of open-source Vault forward everything"
	DuplicateAttributes Difference = "OpenBao accepts a policy with a duplicate attribute; Vault refuses it since 1.21"
	WholeValues         Difference = "OpenBao compares allowed_parameters with a whole value; Vault, since 1.21, with each item of a comma-separated list too, so an empty value passes"
	StepDownIsIgnored   Difference = "OpenBao's step-down sometimes returns 204 and does nothing, on a node that became active in an earlier failover; try again"
	MountsArriveLater   Difference = "a new mount takes up to two seconds to reach OpenBao's standbys, which return 404 until then"
)

// StandbyLag is how long an OpenBao standby (StandbysRead) may serve outdated data:
// normally milliseconds, and seconds after a restart, until it has caught up with the
// active node's log.
const StandbyLag = 20 * time.Second

// Has reports whether the product has the difference.
func (p Product) Has(Difference) bool { return p == OpenBao }
