// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/lifetime"
)

// This file is where tokens are read, creds/<role>, and replaced before their
// time, rotate-role/<role>; and the type of the leases on them.

const (
	credsPrefix  = "creds/"
	rotatePrefix = "rotate-role/"

	// secretType is kept in every lease: it must not change.
	secretType = "mojoauth_access_token"
)

func (b *backend) pathCreds() []*framework.Path {
	return []*framework.Path{
		{
			Pattern: credsPrefix + framework.GenericNameRegex("role") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
				OperationSuffix: "access-token",
			},
			Fields: map[string]*framework.FieldSchema{
				"role": {
					Type:        framework.TypeString,
					Required:    true,
					Description: "Name of the role to read an access token of.",
				},
				"scopes": {
					Type:  framework.TypeCommaStringSlice,
					Query: true,
					Description: `Some of the role's scopes, separated by commas or spaces, to get a token that
may do less. All of them when it is empty.`,
				},
				"min_ttl": {
					Type:  framework.TypeDurationSecond,
					Query: true,
					Description: `Life that the token should have left, when that is more than the role's min_ttl:
a new one is minted if need be. As far as the lifetime that MojoAuth gives
tokens allows (0.8 of it). In seconds or as a duration like 10m.`,
				},
				"minted_after": {
					Type:  framework.TypeString,
					Query: true,
					Description: `The last_vault_rotation of a token that the API refused: a token that was minted
later is wanted. A new one is minted if need be, at most every 30 s; if there is none
within 2 s, the answer is the token there is, with a warning.`,
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				// Not forwarded: any node that may read serves from its own cache.
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.credsRead,
					Summary:      "Read an access token of a role.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      tokenFields(),
					}}},
				},
			},
			HelpSynopsis:    "Read an access token of a role.",
			HelpDescription: strings.TrimSpace(credsHelp),
		},
	}
}

func (b *backend) pathRotateRole() []*framework.Path {
	return []*framework.Path{
		{
			Pattern: rotatePrefix + framework.GenericNameRegex("role") + "$",
			DisplayAttrs: &framework.DisplayAttributes{
				OperationPrefix: operationPrefix,
				OperationSuffix: "role",
			},
			Fields: map[string]*framework.FieldSchema{
				"role": {
					Type:        framework.TypeString,
					Required:    true,
					Description: "Name of the role whose token is to be replaced.",
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:     b.rotateRole,
					Summary:      "Mint a new token of a role now, and drop the older ones on every node.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "rotate"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      pick(tokenFields(), "last_vault_rotation", "expires_at", "expires_at_seconds"),
					}}},
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis:    "Replace the token of a role before its time.",
			HelpDescription: strings.TrimSpace(rotateHelp),
		},
	}
}

// secretToken is the type of leases on tokens, for roles with generate_lease. It
// stays known whatever roles say, so that every lease there is can be revoked.
func (b *backend) secretToken() *framework.Secret {
	return &framework.Secret{
		Type:   secretType,
		Fields: tokenFields(),
		// Nothing to do: MojoAuth cannot revoke a token, and the cached one
		// belongs to other readers too.
		Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return nil, nil
		},
	}
}

// tokenFields describes what a read of creds/<role> answers.
func tokenFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"access_token": {
			Type:         framework.TypeString,
			Required:     true,
			Description:  "The access token, to be sent as a bearer token (RFC 6750).",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"token_type": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Type of the token, as MojoAuth tells it: Bearer, also when it tells none.",
		},
		"scope": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Scopes that were granted, separated by spaces.",
		},
		"expires_at": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When to stop using the token: RFC 3339, UTC.",
		},
		"expires_at_seconds": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "When to stop using the token: Unix time in seconds.",
		},
		"ttl": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds until the token should be read again. Not the token's life.",
		},
		"rotation_period": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds between two rotations of the token.",
		},
		"last_vault_rotation": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When the token was minted: RFC 3339, UTC.",
		},
	}
}

func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	resp, how, err := b.readToken(ctx, req, d)
	b.telemetry.read(how)
	return resp, err
}

func (b *backend) readToken(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, outcome, error) {
	name := d.Get("role").(string)
	q, err := b.query(ctx, req.Storage, name, d)
	if err == nil && b.tokens.forwards(q) {
		err = errForward
	}
	var answer served
	if err == nil {
		var ok bool
		if answer, ok = b.tokens.cached(q); !ok {
			q, answer, err = b.awaitToken(ctx, req.Storage, q, d)
		}
	}
	switch {
	case err == nil:
		return b.tokenResponse(q, &answer), answer.outcome, nil
	case errors.Is(err, errForward) && b.tokens.standby:
		return nil, outcomeForwarded, errForward
	default:
		resp, err := mintFailure(name, err)
		return resp, outcomeError, err
	}
}

// awaitToken waits for a token, and looks role and config up again when they are
// written meanwhile.
func (b *backend) awaitToken(ctx context.Context, s logical.Storage, q *query, d *framework.FieldData) (*query, served, error) {
	arrived := time.Now()
	if err := b.checkMintedAfter(q, arrived); err != nil {
		return nil, served{}, err
	}
	ctx, cancel := withDeadline(ctx, q)
	defer cancel()
	for {
		q.arrived = arrived
		answer, err := b.tokens.await(ctx, q)
		if !errors.Is(err, errOutdated) || ctx.Err() != nil {
			return q, answer, err
		}
		if q, err = b.query(ctx, s, q.role.name, d); err != nil {
			return nil, served{}, inTime(ctx, err)
		}
	}
}

// inTime is the error of a look-up in storage, told as what it is when the deadline has
// passed meanwhile.
func inTime(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return fmt.Errorf("reading role, config and token from storage took longer than a request may: %w", err)
}

// withDeadline bounds all that a request for a token waits for on this node: its turn,
// another mint, a mint of its own.
func withDeadline(ctx context.Context, q *query) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, q.config.entry.longest())
}

// query looks up what a role's token is requested for. d has the query of a read, and
// is nil where there is none. The error is a problem when the user can solve it.
func (b *backend) query(ctx context.Context, s logical.Storage, name string, d *framework.FieldData) (*query, error) {
	role, err := b.roles.get(ctx, s, name)
	if err != nil {
		return nil, err
	}
	if role == nil && b.tokens.standby { // it may just have been written
		return nil, errForward
	}
	if role == nil {
		return nil, problemf("role %q does not exist: create it by writing roles/%s, or list the roles there are at roles/", name, name)
	}
	config, err := b.configs.get(ctx, s, role.entry.Config)
	if err != nil {
		return nil, err
	}
	if config == nil && b.tokens.standby {
		return nil, errForward
	}
	if config == nil {
		return nil, problemf("config %q, which role %q names, does not exist: create it by writing config/%s, or change the role's field config", role.entry.Config, name, role.entry.Config)
	}
	q := &query{spec: spec{role: role, config: config, scopes: role.entry.Scopes}, minTTL: role.entry.MinTTL}
	if d == nil {
		return q, nil
	}
	return q, q.narrow(d)
}

// narrow takes in the query fields of a read. The error is what is wrong with them.
func (q *query) narrow(d *framework.FieldData) error {
	if asked, ok := d.GetOk("min_ttl"); ok {
		q.minTTL = max(q.minTTL, time.Duration(asked.(int))*time.Second)
	}
	if after, ok := d.GetOk("minted_after"); ok && after.(string) != "" {
		at, err := time.Parse(time.RFC3339, after.(string))
		if err != nil {
			return problem("minted_after cannot be read: send the last_vault_rotation of the token that was refused, a time like 2026-03-02T09:00:00Z")
		}
		q.mintedAfter = at
	}
	sent, ok := d.GetOk("scopes")
	if !ok {
		return nil
	}
	asked, err := parseScopes(sent.([]string))
	if err != nil {
		return problem(err.Error())
	}
	if outside, ok := subsetOf(q.role.entry.Scopes, asked); !ok {
		return problemf("scopes holds %q, which role %q does not have: request a subset of %q, or omit scopes", outside, q.role.name, q.role.entry.Scopes)
	}
	if len(asked) == 0 || len(asked) == len(q.role.entry.Scopes) {
		return nil // all of them, since neither holds one twice
	}
	slices.Sort(asked)
	q.scopes, q.narrowed = asked, joinScopes(asked)
	return nil
}

// checkMintedAfter refuses a minted_after that no token has been refused for: it is
// ahead of the clock, and of the token that is held.
func (b *backend) checkMintedAfter(q *query, now time.Time) error {
	if q.mintedAfter.Unix() <= now.Unix() {
		return nil
	}
	if s := b.tokens.peek(q.key()); s != nil {
		if held := s.held(&q.spec); held != nil && held.mintedAt.Unix() >= q.mintedAfter.Unix() {
			return nil
		}
	}
	return problem("minted_after is ahead of the clock and of the cached token: send the last_vault_rotation of the token that was refused")
}

// tokenResponse is the answer to a read of creds/<role>.
func (b *backend) tokenResponse(q *query, answer *served) *logical.Response {
	same := &answer.common
	data := map[string]any{
		"access_token":        same.accessToken,
		"token_type":          same.tokenType,
		"scope":               same.scope,
		"expires_at":          same.expiresAt,
		"expires_at_seconds":  same.expiresAtSeconds,
		"ttl":                 answer.ttl,
		"rotation_period":     same.rotationPeriod,
		"last_vault_rotation": same.lastVaultRotation,
	}
	if answer.schedule != answer.cachedToken.schedule { // the reader's min_ttl counts
		data["rotation_period"] = answer.schedule.RotationPeriod()
	}
	resp := &logical.Response{Data: data}
	if q.role.entry.GenerateLease {
		resp = b.Secret(secretType).Response(data, nil)
		resp.Secret.TTL = answer.lease
	}
	if answer.left < q.minTTL {
		why := whyNot(answer)
		if answer.failure != nil {
			why = "no new one could be had: " + why
		}
		resp.AddWarning(fmt.Sprintf("The token has %s left, less than the min_ttl of %s: %s.", answer.left.Round(time.Second), q.minTTL, why))
	}
	if !answer.isAfter(q.mintedAfter) && answer.outcome == outcomeStale {
		resp.AddWarning(fmt.Sprintf("No token minted after %s could be had: %s.", formatTime(q.mintedAfter), whyNot(answer)))
	}
	if answer.repeated() && answer.left <= lifetime.New(answer.schedule.Lifetime, 0).Floor {
		resp.AddWarning(fmt.Sprintf("The token has %s left, and MojoAuth returns the same one when asked for another.", answer.left.Round(time.Second)))
	}
	if answer.assumed {
		resp.AddWarning(fmt.Sprintf("MojoAuth reported no lifetime; assuming %dm. Set max_ttl of role %q to the lifetime of its tokens.", lifetime.Assumed/time.Minute, q.role.name))
	} else if answer.schedule.Lifetime < shortestKeepable {
		resp.AddWarning(fmt.Sprintf("The token's lifetime is %s: no reader can keep up with that. Have MojoAuth issue tokens that live longer, or raise max_ttl of role %q.", answer.schedule.Lifetime, q.role.name))
	}
	if len(answer.missing) > 0 {
		resp.AddWarning(fmt.Sprintf("MojoAuth granted fewer scopes than requested for role %q: %s missing.", q.role.name, joinScopes(answer.missing)))
	}
	return resp
}

// shortestKeepable is the shortest lifetime that readers can keep up with.
const shortestKeepable = 10 * time.Second

// whyNot says why a reader did not get a newer token.
func whyNot(answer *served) string {
	switch {
	case answer.failure != nil:
		return answer.failure.Error()
	case answer.outcome == outcomeStale:
		return "a new one is being minted, which takes longer than a read waits"
	case answer.outcome == outcomeHit, answer.outcome == outcomeRestored:
		return fmt.Sprintf("its whole lifetime is %s, and one that has more than %s left is not replaced", answer.schedule.Lifetime, answer.schedule.Refresh)
	default:
		return fmt.Sprintf("this one is new, and its whole lifetime is %s", answer.schedule.Lifetime)
	}
}

// missingScopes are those asked for that were not granted.
func missingScopes(asked []string, granted string) []string {
	if granted == joinScopes(asked) {
		return nil
	}
	have := strings.Fields(granted)
	return slices.DeleteFunc(slices.Clone(asked), func(scope string) bool { return slices.Contains(have, scope) })
}

func (b *backend) rotateRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("role").(string)
	tok, err := b.rotate(ctx, req.Storage, name)
	if err != nil {
		return mintFailure(name, err)
	}
	return &logical.Response{Data: map[string]any{
		"last_vault_rotation": tok.common.lastVaultRotation,
		"expires_at":          tok.common.expiresAt,
		"expires_at_seconds":  tok.common.expiresAtSeconds,
	}}, nil
}

// rotate mints a token and makes it the role's on every node. When that fails,
// nothing is dropped.
func (b *backend) rotate(ctx context.Context, s logical.Storage, name string) (*cachedToken, error) {
	arrived := time.Now()
	q, err := b.query(ctx, s, name, nil)
	if err != nil {
		return nil, err
	}
	timed, cancel := withDeadline(ctx, q)
	defer cancel()
	for {
		q.arrived = arrived
		tok, err := b.tokens.rotate(ctx, timed, q, b.rotateTo)
		if !errors.Is(err, errOutdated) || timed.Err() != nil {
			return tok, err
		}
		if q, err = b.query(timed, s, name, nil); err != nil {
			return nil, inTime(timed, err)
		}
	}
}

// rotateTo makes tok, which was minted for a spec, the token of its role. The new
// generation in the role's entry has all nodes drop the older tokens, as any write
// does.
func (b *backend) rotateTo(ctx context.Context, minted *spec, tok *cachedToken) (*cachedToken, error) {
	name, s := minted.role.name, b.tokens.storage
	var (
		next     *cachedToken
		prepared *slot
	)
	_, err := b.roles.update(ctx, s, name, func(role *held[roleEntry]) (*roleEntry, error) {
		if role == nil || !role.entry.asksSameAs(&minted.role.entry) {
			return nil, problemf("role %q was written while its new token was minted, which dropped the older tokens: rotate again if that is not enough", name)
		}
		config, err := b.configs.get(ctx, s, role.entry.Config)
		if err != nil {
			return nil, err
		}
		if config == nil || config.entry.TokenGeneration != minted.config.entry.TokenGeneration {
			return nil, problemf("config %q was written while role %q got its new token, which dropped the older tokens: rotate again if that is not enough", role.entry.Config, name)
		}
		current := &spec{role: role, config: config, scopes: role.entry.Scopes}
		if next, err = b.tokens.successor(current, tok); err != nil {
			return nil, err
		}
		entry := role.entry
		entry.TokenGeneration = rand.Text()
		// Before readers can look for it: they find the token, and mint none.
		rotated := &spec{role: &held[roleEntry]{name: name, entry: entry}, config: config, scopes: entry.Scopes}
		next = next.view(rotated)
		prepared, err = b.tokens.prepare(rotated, next)
		return &entry, err
	})
	if err != nil && prepared != nil {
		b.tokens.unprepare(prepared)
	}
	if err == nil { // before the answer, so that no node serves the old one after it
		ctx, cancel := b.tokens.background()
		defer cancel()
		b.tokens.save(ctx, prepared)
	}
	return next, err
}

// mintFailure is how a request that got no token is answered: 400 for a user's mistake
// and for what MojoAuth refused, 504 when it gave no answer in time, 429 when the
// request had no turn at the gate or no time to be made anew, and 502 for other faults
// of MojoAuth's.
//
// A CodedError has to be the outermost error: wrapped, it reaches Vault as 500.
func mintFailure(role string, err error) (*logical.Response, error) {
	var (
		mistake problem
		late    *noTurnError
		failure *unavailable
	)
	switch {
	case errors.As(err, &mistake):
		return logical.ErrorResponse(string(mistake)), nil
	case errors.Is(err, errOutdated): // until the time was over
		return retryAfterHeader(time.Second), logical.CodedError(http.StatusTooManyRequests, fmt.Sprintf("no token for role %q: the role or its config was written meanwhile, and there is no time left to look again. Try again.", role))
	case errors.As(err, &late):
		return retryAfterHeader(late.ComeBack), logical.CodedError(http.StatusTooManyRequests, fmt.Sprintf("no token for role %q: %s.", role, late))
	case !errors.As(err, &failure):
		return nil, err
	}
	text := fmt.Sprintf("no token for role %q: %s. %s.", role, failure, failure.remedy())
	switch {
	case failure.refused():
		return logical.ErrorResponse(text), nil
	case failure.class == classInternal:
		return nil, errors.New(text)
	case failure.class == classTimeout:
		return nil, logical.CodedError(http.StatusGatewayTimeout, text)
	default:
		return nil, logical.CodedError(http.StatusBadGateway, text)
	}
}

// longestRetryAfterTold keeps Vault's own client, which sleeps for as long as the header
// says, from sleeping through the minute that it has for a request.
const longestRetryAfterTold = 30 * time.Second

// retryAfterHeader is what goes with a 429: an answer of headers only, which Vault hands
// on if the mount's allowed_response_headers has Retry-After, and which leaves the status
// of the error alone.
func retryAfterHeader(wait time.Duration) *logical.Response {
	seconds := lifetime.WholeSeconds(min(wait, longestRetryAfterTold))
	return &logical.Response{Headers: map[string][]string{"Retry-After": {strconv.FormatInt(seconds, 10)}}}
}

const credsHelp = `
The token is valid for a while yet: at least a tenth of its lifetime or a
minute, whichever is less, and usually a quarter or more. It comes from memory or
from Vault's storage, or is new when neither has one.

When there is no token that may be served and none can be had, the answer is 400
if MojoAuth refused, 504 if it gave no answer in time, 429 if the request for one had
no turn in time, and else 502; it says what failed and when to come back.

Read again after "ttl" seconds. The engine has the next token ready by then.

The answer has a lease only when the role says generate_lease. Revoking it does
not end the token, which MojoAuth cannot do: it stays valid until "expires_at".
`

const rotateHelp = `
A new token is minted, whatever is cached and whatever failed before; its request
waits for a turn at the config's gate like any other, and comes early there. Then the
role's older tokens are dropped on every node and in storage, and reads get the new
one. When no new token can be had, nothing is dropped and the error is told.

The older tokens stay valid until they end: MojoAuth cannot revoke them.
`
