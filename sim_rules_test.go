// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

//go:build simulate

package mojoauth

import (
	"os"
	"strings"
	"time"
)

// This file holds the rules that the simulation judges by. The numbers and formulas
// are written down here a second time, on purpose: nothing here calls the code that is
// judged.

const (
	simMaxFloor      = 60 * time.Second
	simMaxMargin     = 300 * time.Second
	simAssumedLife   = 5 * time.Minute
	simLongestLife   = 365 * 24 * time.Hour
	simPatience      = 2 * time.Second
	simFirstBackoff  = 5 * time.Second
	simLastBackoff   = 30 * time.Second
	simRepeatedFloor = 5 * time.Second
	simCloseWithin   = 5 * time.Second
)

// simLife is what follows from a token's lifetime and the min_ttl of its readers.
type simLife struct{ life, floor, margin, refresh, jitter time.Duration }

func newSimLife(life, minTTL time.Duration) simLife {
	l := simLife{
		life:    life,
		floor:   min(simMaxFloor, life/10),
		margin:  min(simMaxMargin, life/10),
		refresh: min(max(minTTL, life/4), life*4/5),
	}
	l.jitter = max(0, (l.refresh-l.margin)/2)
	return l
}

// simLifetime is L of a token of which the endpoint told this, 0 for nothing.
func simLifetime(told, maxTTL time.Duration) time.Duration {
	switch {
	case told > 0 && maxTTL > 0:
		return min(told, maxTTL)
	case told > 0:
		return told
	case maxTTL > 0:
		return min(maxTTL, simLongestLife)
	default:
		return simAssumedLife
	}
}

// simBackoff is the back-off after that many failures in a row: the shortest and the
// longest that the jitter allows.
func simBackoff(failures int) (shortest, longest time.Duration) {
	wait := simFirstBackoff
	for i := 1; i < failures && wait < simLastBackoff; i++ {
		wait *= 2
	}
	wait = min(wait, simLastBackoff)
	return wait * 4 / 5, wait
}

// simSeconds rounds down to seconds, but not below one.
func simSeconds(d time.Duration) int64 { return max(1, int64(d/time.Second)) }

// simRule names a rule that can be switched off.
type simRule string

const (
	ruleExpiredOnArrival   simRule = "expired-on-arrival"
	ruleOneDeadline        simRule = "one-deadline"
	ruleSilentAnswer       simRule = "silent-answer"
	ruleOldFailure         simRule = "old-failure"
	ruleSuspectKey         simRule = "suspect-key"
	ruleRefusalInOutage    simRule = "refusal-in-outage"
	ruleRequestStatus      simRule = "request-status"
	ruleEngineFailure      simRule = "engine-failure"
	ruleRotatedInUse       simRule = "rotated-in-use"
	ruleBackoffOfOthers    simRule = "backoff-of-others"
	ruleRewrittenRole      simRule = "rewritten-role"
	ruleClientsFreed       simRule = "clients-freed"
	ruleTokensFreed        simRule = "tokens-freed"
	ruleLaterEnd           simRule = "later-end"
	ruleRepeatedToken      simRule = "repeated-token"
	rulePrivateDescription simRule = "private-description"
	ruleVerifyPace         simRule = "verify-pace"
	ruleMintReadsAnew      simRule = "mint-reads-anew"
	ruleNarrowedBound      simRule = "narrowed-bound"
	ruleSpread             simRule = "spread"
	ruleBadEntry           simRule = "bad-entry"
)

// simRules are the rules that the engine does not keep in full yet, with what each
// says. One that is off is neither checked nor provoked. All that is not in this
// table is always checked.
var simRules = []struct {
	name simRule
	on   bool
	says string
}{
	{ruleExpiredOnArrival, false, "a token at or below its floor when it arrives backs off its key"},
	{ruleOneDeadline, false, "a read is answered within request_timeout and a second"},
	{ruleSilentAnswer, false, "an answer without an end outlasts neither request_timeout nor closing"},
	{ruleOldFailure, false, "a failure of a mint that began before the config's last success backs off its key only"},
	{ruleSuspectKey, false, "a key whose failure was followed by another key's success backs off itself only"},
	{ruleRefusalInOutage, false, "a refused request does not end a config's back-off after an outage"},
	{ruleRequestStatus, false, "413, 414, 415, 422 and 431 concern the request"},
	{ruleEngineFailure, false, "a client that cannot be made backs off the config"},
	{ruleRotatedInUse, false, "a token of a rotation counts as in use when the one before did"},
	{ruleBackoffOfOthers, false, "a back-off outlives an invalidation of something else"},
	{ruleRewrittenRole, false, "a reader who waits while the role is rewritten does not get the old role's failure"},
	{ruleClientsFreed, false, "the client of a deleted config is closed"},
	{ruleTokensFreed, false, "a mount that nobody has read for days holds no token"},
	{ruleLaterEnd, false, "of two tokens the one that ends later stays"},
	{ruleRepeatedToken, false, "a token that the endpoint repeats keeps its first answer's life"},
	{rulePrivateDescription, false, "what MojoAuth says of a key is told to that key's readers only"},
	{ruleVerifyPace, false, "one verification at a time, at most one a second"},
	{ruleMintReadsAnew, false, "a mint asks for what storage holds, also when an invalidation was lost"},
	{ruleNarrowedBound, false, "128 narrowed keys of a role at most, one mint of a key even if it was evicted"},
	{ruleSpread, false, "a renewal begins L/100 to L/20 before the token is due"},
	{ruleBadEntry, false, "an entry that cannot be read is not looked at again and again"},
}

// simSwitchedOn is what a run checks: the table, or all with RULES=all, or the table
// and more with RULES=name,name. A name with a minus is off.
func simSwitchedOn() map[simRule]bool {
	on := make(map[simRule]bool)
	asked := strings.Split(os.Getenv("RULES"), ",")
	for _, rule := range simRules {
		on[rule.name] = rule.on
		for _, name := range asked {
			switch name {
			case "all", string(rule.name):
				on[rule.name] = true
			case "none", "-" + string(rule.name):
				on[rule.name] = false
			}
		}
	}
	return on
}
