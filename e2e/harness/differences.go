// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import "time"

// Difference is something in which OpenBao is not like Vault and that a test, or this
// harness, has to allow for. All of them are here. The text is the reason, as the run
// prints it when a test is skipped for it.
type Difference string

// Seen with OpenBao 2.7.2 and Vault 1.21.0.
const (
	// The harness allows for these.

	AuditInConfiguration Difference = "OpenBao declares audit devices in its configuration file, and refuses them over the API; on all nodes of a cluster with the same options, so that clusters have none"
	NoFileStorage        Difference = "OpenBao has no file storage: a node alone keeps its data in Raft"
	NoMemoryLock         Difference = "OpenBao does not lock memory, and warns about disable_mlock"
	PatientNodes         Difference = "performance_multiplier is that many times 3 s in OpenBao, and that many seconds in Vault"
	VariablesOfItsOwn    Difference = "bao reads BAO_ADDR, BAO_TOKEN and BAO_CACERT before VAULT_ADDR and so on"

	// Tests ask for these.

	NoPluginPins        Difference = "OpenBao has no plugin pins (sys/plugins/pins): a mount's own version is all there is"
	Namespaces          Difference = "OpenBao has namespaces; Vault has them in its Enterprise edition only, and ignores their header"
	StandbysRead        Difference = "OpenBao's standbys run the plugin and answer reads themselves, with what was there before a write for up to StandbyLag; those of open-source Vault forward everything"
	DuplicateAttributes Difference = "OpenBao takes a policy that has an attribute twice; Vault refuses it since 1.21"
	WholeValues         Difference = "OpenBao compares allowed_parameters with a whole value; Vault, since 1.21, with each item of a comma-separated list too, so an empty value passes"
	StepDownIsIgnored   Difference = "OpenBao's step-down now and then answers 204 and does nothing, on a node that became active by an earlier failover: ask again"
	MountsArriveLater   Difference = "a new mount takes up to two seconds to reach OpenBao's standbys, which answer 404 until then"
)

// StandbyLag is how long a standby of OpenBao (StandbysRead) may answer with what was there
// before: milliseconds when all is well, and seconds after it was started again, until the
// active node's log has reached it.
const StandbyLag = 20 * time.Second

// Has tells whether the product is one with that difference.
func (p Product) Has(Difference) bool { return p == OpenBao }
