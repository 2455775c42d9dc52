{{/* What the operator may do in the namespaces it serves. */}}
{{- define "kvserve.operator.rules" -}}
- apiGroups: [kvserve.io]
  resources: [kvservepolicies]
  verbs: [get, list, watch]
# server-side apply of its part of the status
- apiGroups: [kvserve.io]
  resources: [kvservepolicies/status]
  verbs: [patch]
# the targets' pods, which it counts, and the Jobs' pods, which say why they fail
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
# evaluation texts, runs' inputs and progress, Pareto sets
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [list, watch, create, patch, delete]
# each run's own service account, which may only touch the run's ConfigMaps
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [create, patch, delete]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [create, patch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{/* What the operator may do in its own namespace, where its replicas agree on a leader. */}}
{{- define "kvserve.operator.ownRules" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [kvserve-operator]
  verbs: [get, update]
{{- end -}}

{{/* What the controller may do in the namespaces it serves. */}}
{{- define "kvserve.controller.rules" -}}
- apiGroups: [kvserve.io]
  resources: [kvservepolicies]
  verbs: [get, list, watch]
# server-side apply of its part of the status
- apiGroups: [kvserve.io]
  resources: [kvservepolicies/status]
  verbs: [patch]
# Pareto sets
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch]
{{- end -}}
