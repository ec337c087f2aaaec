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

// This file has the paths that read tokens, creds/<role>, and that replace them on
// request, rotate-role/<role>, and the secret type of their leases.

const (
	credsPrefix  = "creds/"
	rotatePrefix = "rotate-role/"

	// secretType must not change: Vault stores it in every lease.
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
					Description: "Name of the role to read an access token for.",
				},
				"scopes": {
					Type:  framework.TypeCommaStringSlice,
					Query: true,
					Description: `A subset of the role's scopes, separated by commas or spaces, for a token with
fewer permissions. If empty, the token has all of the role's scopes.`,
				},
				"min_ttl": {
					Type:  framework.TypeDurationSecond,
					Query: true,
					Description: `Minimum time left of the token, if longer than the role's min_ttl. The engine
mints a new token if necessary. Honored up to 0.8 of the token's lifetime. A number of
seconds or a duration such as 10m.`,
				},
				"minted_after": {
					Type:  framework.TypeString,
					Query: true,
					Description: `The last_vault_rotation of a token that an API refused, to get a token that was
minted later. The engine mints a new token if necessary, at most once every 30 seconds.
If there is none within 2 seconds, the read returns the cached token with a warning.`,
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				// This is not forwarded: each node serves reads from its own cache.
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.credsRead,
					Summary:      "Read an access token for a role.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      tokenFields(),
					}}},
				},
			},
			HelpSynopsis:    "Read an access token for a role.",
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
					Description: "Name of the role whose token to replace.",
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:     b.rotateRole,
					Summary:      "Mint a new token for a role now, and drop its older tokens on every node.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "rotate"},
					Responses: map[int][]framework.Response{http.StatusOK: {{
						Description: "OK",
						Fields:      pick(tokenFields(), "last_vault_rotation", "expires_at", "expires_at_seconds"),
					}}},
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis:    "Replace the token of a role now.",
			HelpDescription: strings.TrimSpace(rotateHelp),
		},
	}
}

// secretToken is the secret type of leases, for roles with generate_lease. It is always
// registered, so every existing lease can be revoked.
func (b *backend) secretToken() *framework.Secret {
	return &framework.Secret{
		Type:   secretType,
		Fields: tokenFields(),
		// There is nothing to do: MojoAuth cannot revoke a token, and other readers
		// share the cached one.
		Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return nil, nil
		},
	}
}

// tokenFields describes the response to a read of creds/<role>.
func tokenFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"access_token": {
			Type:         framework.TypeString,
			Required:     true,
			Description:  "The access token, to send as a bearer token (RFC 6750).",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"token_type": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Type of the token as MojoAuth reports it, or Bearer if it reports none.",
		},
		"scope": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "Granted scopes, separated by spaces.",
		},
		"expires_at": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When to stop using the token, as an RFC 3339 time in UTC.",
		},
		"expires_at_seconds": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "When to stop using the token, as Unix time in seconds.",
		},
		"ttl": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds after which to read again. This is not the token's lifetime.",
		},
		"rotation_period": {
			Type:        framework.TypeInt64,
			Required:    true,
			Description: "Seconds after which the engine replaces a token in use.",
		},
		"last_vault_rotation": {
			Type:        framework.TypeString,
			Required:    true,
			Description: "When the token was minted, as an RFC 3339 time in UTC.",
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

// awaitToken waits for a token. If the role or config is written meanwhile, it looks both
// up again.
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

// inTime returns the error of a storage lookup. If the deadline has passed, the error says
// so.
func inTime(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return fmt.Errorf("reading the role, config, or token from storage took longer than the request may take: %w", err)
}

// withDeadline bounds the time that a request for a token waits on this node: for its turn,
// another mint, or its own mint.
func withDeadline(ctx context.Context, q *query) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, q.config.entry.longest())
}

// query looks up the role and its config. d has the query of a read, and is nil for other
// requests. The error is a problem if the user can fix it.
func (b *backend) query(ctx context.Context, s logical.Storage, name string, d *framework.FieldData) (*query, error) {
	role, err := b.roles.get(ctx, s, name)
	if err != nil {
		return nil, err
	}
	if role == nil && b.tokens.standby { // the role may just have been written
		return nil, errForward
	}
	if role == nil {
		return nil, problemf("role %q does not exist; write roles/%s to create it, or list roles/ for the existing roles", name, name)
	}
	config, err := b.configs.get(ctx, s, role.entry.Config)
	if err != nil {
		return nil, err
	}
	if config == nil && b.tokens.standby {
		return nil, errForward
	}
	if config == nil {
		return nil, problemf("config %q of role %q does not exist; write config/%s to create it, or change the role's config", role.entry.Config, name, role.entry.Config)
	}
	q := &query{spec: spec{role: role, config: config, scopes: role.entry.Scopes}, minTTL: role.entry.MinTTL}
	if d == nil {
		return q, nil
	}
	return q, q.narrow(d)
}

// narrow applies the query fields of a read. The error says what is wrong with them.
func (q *query) narrow(d *framework.FieldData) error {
	if requested, ok := d.GetOk("min_ttl"); ok {
		q.minTTL = max(q.minTTL, time.Duration(requested.(int))*time.Second)
	}
	if after, ok := d.GetOk("minted_after"); ok && after.(string) != "" {
		at, err := time.Parse(time.RFC3339, after.(string))
		if err != nil {
			return problem("minted_after is not an RFC 3339 time; send the last_vault_rotation of the refused token, such as 2026-03-02T09:00:00Z")
		}
		q.mintedAfter = at
	}
	sent, ok := d.GetOk("scopes")
	if !ok {
		return nil
	}
	requested, err := parseScopes(sent.([]string))
	if err != nil {
		return problem(err.Error())
	}
	if outside, ok := subsetOf(q.role.entry.Scopes, requested); !ok {
		return problemf("scopes contains %q, which role %q does not have; request a subset of %q, or omit scopes", outside, q.role.name, q.role.entry.Scopes)
	}
	if len(requested) == 0 || len(requested) == len(q.role.entry.Scopes) {
		return nil // all scopes, because neither list has duplicates
	}
	slices.Sort(requested)
	q.scopes, q.narrowed = requested, joinScopes(requested)
	return nil
}

// checkMintedAfter refuses a minted_after that no token can have: one that is later than
// both the clock and the cached token.
func (b *backend) checkMintedAfter(q *query, now time.Time) error {
	if q.mintedAfter.Unix() <= now.Unix() {
		return nil
	}
	if s := b.tokens.peek(q.key()); s != nil {
		if held := s.held(&q.spec); held != nil && held.mintedAt.Unix() >= q.mintedAfter.Unix() {
			return nil
		}
	}
	return problem("minted_after is later than both the current time and the cached token; send the last_vault_rotation of the refused token")
}

// tokenResponse returns the response to a read of creds/<role>.
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
	if answer.schedule != answer.cachedToken.schedule { // because of the reader's min_ttl
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
			why = "no new token is available: " + why
		}
		resp.AddWarning(fmt.Sprintf("The token has %s left, less than the min_ttl of %s: %s.", answer.left.Round(time.Second), q.minTTL, why))
	}
	if !answer.isAfter(q.mintedAfter) && answer.outcome == outcomeStale {
		resp.AddWarning(fmt.Sprintf("No token minted after %s is available: %s.", formatTime(q.mintedAfter), whyNot(answer)))
	}
	if answer.repeated() && answer.left <= lifetime.New(answer.schedule.Lifetime, 0).Floor {
		resp.AddWarning(fmt.Sprintf("The token has %s left, and MojoAuth keeps returning the same token.", answer.left.Round(time.Second)))
	}
	if answer.assumed {
		resp.AddWarning(fmt.Sprintf("MojoAuth reported no lifetime; assuming %dm. Set max_ttl of role %q to the lifetime of its tokens.", lifetime.Assumed/time.Minute, q.role.name))
	} else if answer.schedule.Lifetime < shortestKeepable {
		resp.AddWarning(fmt.Sprintf("The token's lifetime of %s is too short for readers to keep up with. Configure a longer token lifetime in MojoAuth, or raise max_ttl of role %q.", answer.schedule.Lifetime, q.role.name))
	}
	if len(answer.missing) > 0 {
		resp.AddWarning(fmt.Sprintf("MojoAuth granted fewer scopes than requested for role %q. Missing: %s.", q.role.name, joinScopes(answer.missing)))
	}
	return resp
}

// shortestKeepable is the shortest token lifetime that readers can keep up with.
const shortestKeepable = 10 * time.Second

// whyNot says why a reader did not get a newer token.
func whyNot(answer *served) string {
	switch {
	case answer.failure != nil:
		return answer.failure.Error()
	case answer.outcome == outcomeStale:
		return "a new token is being minted, which takes longer than a read waits"
	case answer.outcome == outcomeHit, answer.outcome == outcomeRestored:
		return fmt.Sprintf("its lifetime is %s, and a token with more than %s left is not replaced", answer.schedule.Lifetime, answer.schedule.Refresh)
	default:
		return fmt.Sprintf("the token is new, but its lifetime is only %s", answer.schedule.Lifetime)
	}
}

// missingScopes returns the requested scopes that were not granted.
func missingScopes(requested []string, granted string) []string {
	if granted == joinScopes(requested) {
		return nil
	}
	have := strings.Fields(granted)
	return slices.DeleteFunc(slices.Clone(requested), func(scope string) bool { return slices.Contains(have, scope) })
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

// rotate mints a token and makes it the role's token on every node. If that fails, it drops
// nothing.
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

// rotateTo makes tok, minted for a spec, the token of its role. The new generation in the
// role's entry makes all nodes drop the older tokens.
func (b *backend) rotateTo(ctx context.Context, minted *spec, tok *cachedToken) (*cachedToken, error) {
	name, s := minted.role.name, b.tokens.storage
	var (
		next     *cachedToken
		prepared *slot
	)
	_, err := b.roles.update(ctx, s, name, func(role *held[roleEntry]) (*roleEntry, error) {
		if role == nil || !role.entry.asksSameAs(&minted.role.entry) {
			return nil, problemf("role %q changed while its new token was being minted, which dropped its older tokens; rotate it again if you still need to", name)
		}
		config, err := b.configs.get(ctx, s, role.entry.Config)
		if err != nil {
			return nil, err
		}
		if config == nil || config.entry.TokenGeneration != minted.config.entry.TokenGeneration {
			return nil, problemf("config %q changed while the new token of role %q was being minted, which dropped its older tokens; rotate the role again if you still need to", role.entry.Config, name)
		}
		current := &spec{role: role, config: config, scopes: role.entry.Scopes}
		if next, err = b.tokens.successor(current, tok); err != nil {
			return nil, err
		}
		entry := role.entry
		entry.TokenGeneration = rand.Text()
		// This comes before readers can look for the slot, so they find the token and
		// do not mint another.
		rotated := &spec{role: &held[roleEntry]{name: name, entry: entry}, config: config, scopes: entry.Scopes}
		next = next.view(rotated)
		prepared, err = b.tokens.prepare(rotated, next)
		return &entry, err
	})
	if err != nil && prepared != nil {
		b.tokens.unprepare(prepared)
	}
	if err == nil { // before the response, so no node serves the old token after it
		ctx, cancel := b.tokens.background()
		defer cancel()
		b.tokens.save(ctx, prepared)
	}
	return next, err
}

// mintFailure returns the response to a request that got no token: 400 for a user's mistake
// or a refusal by MojoAuth, 504 if MojoAuth did not answer in time, 429 if the request got
// no turn at the gate or had no time to start over, and 502 for other failures of MojoAuth.
//
// A CodedError must be the outermost error: a wrapped one reaches Vault as 500.
func mintFailure(role string, err error) (*logical.Response, error) {
	var (
		mistake problem
		late    *noTurnError
		failure *unavailable
	)
	switch {
	case errors.As(err, &mistake):
		return logical.ErrorResponse(string(mistake)), nil
	case errors.Is(err, errOutdated): // until time ran out
		return retryAfterHeader(time.Second), logical.CodedError(http.StatusTooManyRequests, fmt.Sprintf("no token for role %q: the role or its config changed during the request, and no time was left to start over. Try again.", role))
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

// longestRetryAfterTold bounds the header Retry-After. Vault's Go client sleeps for as long
// as the header says, and allows a minute for the entire request.
const longestRetryAfterTold = 30 * time.Second

// retryAfterHeader returns the response that accompanies a 429. It has headers only, which
// do not change the error's status. Vault passes the header on if the mount's
// allowed_response_headers has Retry-After.
func retryAfterHeader(wait time.Duration) *logical.Response {
	seconds := lifetime.WholeSeconds(min(wait, longestRetryAfterTold))
	return &logical.Response{Headers: map[string][]string{"Retry-After": {strconv.FormatInt(seconds, 10)}}}
}

const credsHelp = `
Returns an access token from memory or from Vault's storage, or mints a new one. The
token has more than a tenth of its lifetime or a minute left, whichever is less, and
usually a quarter of its lifetime or more.

Read again after "ttl" seconds. By then the engine has renewed the token.

If no token is available, the read fails: with HTTP 400 if MojoAuth refused, 504 if
it did not answer in time, 429 if the token request got no turn in time, and 502 if
MojoAuth failed in another way. The error says what failed and when to try again.

The response has a lease only if the role sets generate_lease. Revoking the lease does
not revoke the token, because MojoAuth cannot: it stays valid until "expires_at".
`

const rotateHelp = `
Mints a new token now, even if a cached token is fresh and even during a back-off. The
token request waits for a turn at the config's gate, ahead of most other requests. Then
the role's older tokens are dropped on every node and in storage, and reads return the
new token. If the mint fails, nothing is dropped, and the error says why.

The older tokens stay valid until they expire, because MojoAuth cannot revoke them.
`
